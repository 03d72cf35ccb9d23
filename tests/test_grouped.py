"""gossamer.grouped_mm and ragged_dot: as torch's, gradients included; rows of nobody are zeros."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("tvm_ffi_orcjit")
import gossamer  # noqa: E402
from gossamer.ir.errors import InputError, UnsupportedError  # noqa: E402

OFFS = torch.tensor([5, 5, 12, 30], dtype=torch.int32)


def expected(a, b, offs, bias=None):
    out, start = torch.zeros(a.shape[0], b.shape[2], dtype=a.dtype), 0
    for g, end in enumerate(offs.tolist()):
        rows = a[start:end] @ b[g] + (0 if bias is None else bias[g])
        out, start = torch.cat((out[:start], rows, out[end:])), end
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("turned", [False, True])
def test_products(dtype, turned):
    a, b = torch.randn(33, 20).to(dtype), torch.randn(4, 20, 24).to(dtype)
    b = b.transpose(1, 2).contiguous().transpose(1, 2) if turned else b
    bias = torch.randn(4, 24).to(dtype)
    found = gossamer.grouped_mm(a, b, offs=OFFS, bias=bias)
    exact = expected(a.double(), b.double(), OFFS, bias.double())
    tolerance = 1e-4 if dtype == torch.float32 else 4e-2
    torch.testing.assert_close(found.double(), exact, rtol=tolerance, atol=tolerance)
    assert not found[30:].any()


def test_two_matrices_give_one_for_each_group():
    a, b = torch.randn(30, 20), torch.randn(30, 24)
    found = gossamer.grouped_mm(a.T, b, offs=OFFS)
    for g, (start, end) in enumerate([(0, 5), (5, 5), (5, 12), (12, 30)]):
        torch.testing.assert_close(found[g], a[start:end].T @ b[start:end], rtol=1e-4, atol=1e-5)


def test_ragged_dot():
    lhs, rhs = torch.randn(33, 8), torch.randn(4, 8, 6)
    found = gossamer.ragged_dot(lhs, rhs, torch.tensor([5, 0, 7, 18]))
    torch.testing.assert_close(found, expected(lhs, rhs, OFFS), rtol=1e-4, atol=1e-5)


def test_gradients():
    given = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((31, 3), (4, 3, 2), (4, 2))]
    run = lambda a, b, bias: gossamer.grouped_mm(a, b, offs=OFFS, bias=bias)  # noqa: E731
    assert torch.autograd.gradcheck(run, given)


def test_no_rows():
    offs = torch.zeros(4, dtype=torch.int32)
    assert gossamer.grouped_mm(torch.zeros(0, 3), torch.zeros(4, 3, 2), offs=offs).shape == (0, 2)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"mat_b": torch.zeros(4, 7, 2)}, "3 in the summed dimension"),
        ({"mat_b": torch.zeros(3)}, r"grouped_mm.mat_b: expected \(groups, K, N\)"),
        ({"mat_b": torch.zeros(4, 3, 2).double()}, "mat_a's dtype torch.float32; got torch.float64"),
        ({"mat_a": torch.zeros(30, 3).int()}, "grouped_mm.mat_a: expected float16"),
        ({"mat_a": torch.zeros(4, 5, 3)}, r"offs: expected None beside two stacks of matrices; got \(4,\)"),
        ({"mat_a": torch.zeros(3, 5, 3), "offs": None}, "3 groups, as mat_a has; got 4"),
        ({"offs": None}, "grouped_mm.offs: expected a torch.Tensor; got NoneType"),
        ({"mat_b": torch.zeros(2000, 3, 2), "offs": torch.zeros(2000).int()}, "1 to 1024 groups; got 2000"),
        ({"offs": torch.zeros(3, dtype=torch.int32)}, "4 groups, as mat_b has"),
        ({"offs": torch.zeros(4)}, "int32 or int64"),
        ({"bias": torch.zeros(2)}, r"\(groups, N\)"),
        ({"bias": torch.zeros(4, 3)}, r"shape \(4, 2\)"),
    ],
    ids=str,
)
def test_bad_input(changed, message):
    given = {"mat_a": torch.zeros(30, 3), "mat_b": torch.zeros(4, 3, 2), "offs": OFFS} | changed
    with pytest.raises(InputError, match=message):
        gossamer.grouped_mm(**given)


def test_gradients_of_two_matrices():
    given = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3, 31), (31, 2))]
    assert torch.autograd.gradcheck(lambda a, b: gossamer.grouped_mm(a, b, offs=OFFS), given)


def test_stacks_of_either_side():
    a, b = torch.randn(4, 5, 20), torch.randn(4, 20, 24)
    bias, columns = torch.randn(4, 24), torch.randn(20, 33)
    found = gossamer.grouped_mm(a, b, bias=bias)
    torch.testing.assert_close(found, a @ b + bias[:, None], rtol=1e-4, atol=1e-5)
    found = gossamer.grouped_mm(a, columns, offs=OFFS)
    for g, (start, end) in enumerate([(0, 5), (5, 5), (5, 12), (12, 30)]):
        torch.testing.assert_close(found[:, start:end], a[g] @ columns[:, start:end], rtol=1e-4, atol=1e-5)
    assert not found[:, 30:].any()
    with pytest.raises(UnsupportedError, match="results have mat_a's dtype"):
        gossamer.grouped_mm(a, b, out_dtype=torch.float64)


@pytest.mark.parametrize("offs", [[8, 14, 14, 5000], [-5, 0, 0, 30], [2**30] * 4])
def test_bounds_outside_of_the_rows_end_there(offs):
    a, b = torch.randn(30, 16), torch.randn(4, 16, 8)
    found = gossamer.grouped_mm(a, b, offs=torch.tensor(offs))
    within = torch.tensor(offs).clamp(0, 30)
    torch.testing.assert_close(found, expected(a, b, within), rtol=1e-4, atol=1e-5)


def test_sums_of_nothing():
    bias, offs = torch.ones(4, 2), torch.tensor([1, 2, 3, 4])
    found = gossamer.grouped_mm(torch.zeros(5, 0), torch.zeros(4, 0, 2), offs=offs, bias=bias)
    assert found.tolist() == [[1.0, 1.0]] * 4 + [[0.0, 0.0]]


def test_tracers_see_one_operator():
    a, b = torch.randn(33, 20, requires_grad=True), torch.randn(4, 20, 24, requires_grad=True)
    bias, sizes = torch.randn(4, 24), torch.tensor([5, 0, 7, 18])

    def block(a, b, bias):
        first = gossamer.grouped_mm(a, b, offs=OFFS, bias=bias).relu()
        return gossamer.ragged_dot(first, b.transpose(1, 2), sizes)

    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")
    found, wanted = compiled(a, b, bias), block(a, b, bias)
    torch.testing.assert_close(found, wanted)
    slopes = [torch.autograd.grad(out.sin().sum(), (a, b)) for out in (found, wanted)]
    torch.testing.assert_close(*slopes)
    total = lambda a, b: block(a, b, bias).sin().sum()  # noqa: E731
    torch.testing.assert_close(torch.func.grad(total, argnums=(0, 1))(a, b), slopes[1])
    each = torch.vmap(block, in_dims=(0, None, None))(torch.stack((a, 2 * a)), b, bias)
    torch.testing.assert_close(each[1], block(2 * a, b, bias))


def test_sizes_are_integers():
    with pytest.raises(InputError, match=r"ragged_dot\.group_sizes: expected int32 or int64"):
        gossamer.ragged_dot(torch.zeros(3, 4), torch.zeros(2, 4, 4), torch.ones(2))
    with pytest.raises(InputError, match=r"ragged_dot\.rhs: expected 3 dimensions \(groups, k, n\)"):
        gossamer.ragged_dot(torch.zeros(3, 4), torch.zeros(4, 4), torch.ones(2).int())
