"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ...ir.errors import InputError

DTYPES = {
    **{name: name for name in ("f16", "bf16", "f32", "f64")},
    **{"float16": "f16", "bfloat16": "bf16", "float32": "f32", "float64": "f64", "half": "f16"},
}


def dtype_of(text: str) -> str:
    """The name of a dtype in the IR. Raises InputError."""
    if text not in DTYPES:
        raise InputError("--dtype", "f16, bf16, f32 or f64", repr(text))
    return DTYPES[text]


def debugging(ctx: Any) -> bool:
    """Whether --debug was given, before or after the command's name."""
    return bool(ctx.find_root().meta.get("gossamer.debug"))


def remember_debug(ctx: typer.Context, wanted: bool) -> None:
    if wanted:
        ctx.find_root().meta["gossamer.debug"] = True


MaskText = Annotated[
    str,
    typer.Argument(
        help='A pattern such as "causal" or "sliding_window(128) | global_tokens(64)"; IR text; '
        "file.py:function; or file.npy.",
        show_default=False,
    ),
]
QLen = Annotated[int, typer.Option("--q-len", metavar="N", min=1, help="Number of queries.")]
KvLen = Annotated[
    int | None,
    typer.Option("--kv-len", metavar="N", min=1, help="Number of keys.", show_default="as --q-len"),
]
Dtype = Annotated[str, typer.Option("--dtype", metavar="DTYPE", help="f16, bf16, f32 or f64.")]
Dim = Annotated[
    int, typer.Option("--dim", metavar="N", min=1, max=1024, help="Head size of queries and keys.")
]
VDim = Annotated[
    int | None,
    typer.Option(
        "--v-dim", metavar="N", min=1, max=1024, help="Head size of values.", show_default="as --dim"
    ),
]
Batch = Annotated[int, typer.Option("--batch", metavar="N", min=1, help="Batch size.")]
Heads = Annotated[int, typer.Option("--heads", metavar="N", min=1, help="Number of query heads.")]
KvHeads = Annotated[
    int | None,
    typer.Option("--kv-heads", metavar="N", min=1, help="Number of key heads.", show_default="as --heads"),
]
TARGETS = "cpu (this machine), cpu:znver4 (an LLVM CPU name), cuda:sm_90, hip:gfx942, ..."
Target = Annotated[str, typer.Option("--target", metavar="TARGET", help=f"What to compile for: {TARGETS}")]
DeviceName = Annotated[
    str | None,
    typer.Option(
        "--device",
        metavar="NAME",
        help="Machine to predict the time of, if not the usual one of the target: cpu, h100, a100, l4, "
        "rtx4090 or mi300x.",
        show_default="the target's",
    ),
]
Debug = Annotated[
    bool,
    typer.Option("--debug", callback=remember_debug, help="Show the traceback of an error."),
]
