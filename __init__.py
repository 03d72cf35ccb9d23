"""gossamer: a compiler for sparse attention and MoE kernels.

This file is the face: it says where each public name lives and imports none of them. A name is imported
when it is first used, so ``import gossamer`` loads no framework, no compiler and no geometry engine.
"""

import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # for editors and type checkers
    from .frontend.attention import attention as attention
    from .frontend.capture.jit import jit as jit
    from .frontend.huggingface import register_transformers as register_transformers
    from .frontend.kernel import AttentionSpec as AttentionSpec
    from .frontend.kernel import compile as compile
    from .frontend.kernel import load as load
    from .frontend.linear.attention import linear_attention as linear_attention
    from .frontend.linear.layers import combiner_attention as combiner_attention
    from .frontend.linear.layers import mossformer_attention as mossformer_attention
    from .frontend.linear.layers import relative_linear_attention as relative_linear_attention
    from .frontend.linear.low_rank import flurka as flurka
    from .frontend.linear.low_rank import flurka_orders as flurka_orders
    from .frontend.mask import Mask as Mask
    from .frontend.moe.experts import experts as experts
    from .frontend.moe.experts import moe as moe
    from .frontend.moe.grouped import grouped_mm as grouped_mm
    from .frontend.moe.grouped import ragged_dot as ragged_dot
    from .frontend.moe.losses import entropy_loss as entropy_loss
    from .frontend.moe.losses import importance_loss as importance_loss
    from .frontend.moe.losses import load_balance_loss as load_balance_loss
    from .frontend.moe.losses import z_loss as z_loss
    from .frontend.moe.quantize import quantize as quantize
    from .frontend.moe.quantize import quantize_experts as quantize_experts
    from .frontend.moe.quantized import QuantizedWeight as QuantizedWeight
    from .frontend.moe.routers import route as route
    from .frontend.moe.routing import Routing as Routing
    from .frontend.moe.slices import slice_experts as slice_experts
    from .frontend.schedules import tune as tune
    from .frontend.score import ProbMod as ProbMod
    from .frontend.score import ScoreMod as ScoreMod
    from .frontend.splat import ACSRTensor as ACSRTensor
    from .frontend.splat import sddmm as sddmm
    from .frontend.splat import sparse_softmax as sparse_softmax
    from .frontend.splat import spmm as spmm
    from .ir.plan import Schedule as Schedule

__version__ = "0.1.0"

# Public name -> the module that defines it.
_NAMES: dict[str, str] = {
    "AttentionSpec": "frontend.kernel",
    "ACSRTensor": "frontend.splat",
    "Mask": "frontend.mask",
    "ProbMod": "frontend.score",
    "QuantizedWeight": "frontend.moe.quantized",
    "Routing": "frontend.moe.routing",
    "Schedule": "ir.plan",
    "ScoreMod": "frontend.score",
    "attention": "frontend.attention",
    "combiner_attention": "frontend.linear.layers",
    "compile": "frontend.kernel",
    "entropy_loss": "frontend.moe.losses",
    "experts": "frontend.moe.experts",
    "flurka": "frontend.linear.low_rank",
    "flurka_orders": "frontend.linear.low_rank",
    "grouped_mm": "frontend.moe.grouped",
    "importance_loss": "frontend.moe.losses",
    "jit": "frontend.capture.jit",
    "linear_attention": "frontend.linear.attention",
    "load": "frontend.kernel",
    "load_balance_loss": "frontend.moe.losses",
    "moe": "frontend.moe.experts",
    "mossformer_attention": "frontend.linear.layers",
    "quantize": "frontend.moe.quantize",
    "quantize_experts": "frontend.moe.quantize",
    "ragged_dot": "frontend.moe.grouped",
    "register_transformers": "frontend.huggingface",
    "relative_linear_attention": "frontend.linear.layers",
    "route": "frontend.moe.routers",
    "sddmm": "frontend.splat",
    "slice_experts": "frontend.moe.slices",
    "sparse_softmax": "frontend.splat",
    "spmm": "frontend.splat",
    "tune": "frontend.schedules",
    "z_loss": "frontend.moe.losses",
}

# Public module -> the module it is another name of, as ``os.path`` is of ``posixpath``.
_MODULES = {
    "feature_maps": "frontend.linear.feature_maps",
    "flex": "frontend.flex",
    "jax": "frontend.jax.face",
    "masks": "frontend.masks",
    "operators": "frontend.operators.all",
    "testing": "frontend.testing",
}

__all__ = ("__version__", *_NAMES, *_MODULES)


def __getattr__(name: str) -> object:
    if name in _MODULES:
        return import_module(f".{name}", __name__)
    if name in _NAMES:
        value = globals()[name] = getattr(import_module(f".{_NAMES[name]}", __name__), name)
        return value
    raise AttributeError(
        f"module {__name__!r} has no attribute {name!r}", name=name, obj=sys.modules[__name__]
    )


def __dir__() -> list[str]:
    return sorted(__all__)


class _AliasImporter(MetaPathFinder, Loader):
    """Makes ``import gossamer.masks`` give ``gossamer.frontend.masks`` itself, not a second copy."""

    def find_spec(self, fullname: str, path: object, target: object = None) -> ModuleSpec | None:
        package, _, name = fullname.rpartition(".")
        return ModuleSpec(fullname, self) if package == __name__ and name in _MODULES else None

    def exec_module(self, module: ModuleType) -> None:
        # What sys.modules holds once a module has run is what the import statement returns.
        name = module.__name__.rpartition(".")[2]
        sys.modules[module.__name__] = import_module(f".{_MODULES[name]}", __name__)


sys.meta_path.append(_AliasImporter())
