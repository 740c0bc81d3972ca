"""The compiled choice of codes against plain torch and against its definition in float64, on every instruction set."""

from functools import cache

import pytest
import torch

from llmopt.quant import grid as grid_module
from llmopt.quant.fit import fit_grid
from llmopt.quant.grid import Grid, grouped
from llmopt.quant.methods import gptq as gptq_module
from llmopt.quant.methods.gptq import BLOCK, Hessian, _Fixed, gptq, round_inputs
from llmopt.weights.scheme import SCHEMES, Scheme

_cpu = pytest.importorskip("llmopt.kernels._cpu", reason="the compiled kernels are not built")

KERNELS = {name: _cpu.Multiplier(2, name) for name in _cpu.instruction_sets()}
TORCH = "torch"
OUTPUTS = (1, 15, 17, 63, 65, 100)
SIZES = (8, 16, 32, 64, 576)
WIDTH = 576
EPS = 2.0**-23

each_set = pytest.mark.parametrize("name", KERNELS)
each_scheme = pytest.mark.parametrize("scheme", [SCHEMES[name] for name in ("w4a16", "w4a16-asym", "w3a16", "w8a16")])


@pytest.fixture(autouse=True)
def use(monkeypatch: pytest.MonkeyPatch):
    """Calling it with an instruction set, or TORCH, makes the code under test run on that."""

    def chosen(name: str) -> None:
        for module in (grid_module, gptq_module):
            monkeypatch.setattr(module, "multiplier", lambda: KERNELS.get(name))

    return chosen


def weight_of(outputs: int, seed: int = 0) -> torch.Tensor:
    """[outputs, WIDTH] with outliers, and inputs that are nothing."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, WIDTH, generator=generator) * 0.05
    weight[:, ::37] *= 20
    weight[0, :70] = 0
    return weight


@cache
def gram() -> torch.Tensor:
    """Of correlated inputs, some much louder than others."""
    generator = torch.Generator().manual_seed(7)
    mixing = torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5 + torch.eye(WIDTH)
    x = torch.randn(1500, WIDTH, generator=generator) @ mixing
    x[:, ::13] *= 8
    return x.T @ x


@cache
def hessian() -> Hessian:
    return Hessian(gram(), damping=0.01)


# What a weight becomes on a grid


@each_set
@each_scheme
@pytest.mark.parametrize("size", [*SIZES, 9])
def test_errors_and_losses_are_torchs(use, name: str, scheme: Scheme, size: int) -> None:
    for outputs in OUTPUTS:
        rows = grouped(weight_of(outputs, seed=size), scheme.with_group_size(size))
        grid = fit_grid(rows * 0.7, scheme.with_group_size(size))  # so that some lie beyond its ends
        importance = torch.rand(rows.shape[1:], generator=torch.Generator().manual_seed(1)).square()
        use(TORCH)
        expected = grid.errors(rows)
        use(name)
        found = grid.errors(rows)
        # The numbers are equal, and so the values but for the last bit.
        assert ((found - expected).abs() <= EPS * (expected.abs() + 2 * rows.abs())).all()
        squares = expected.double().square()
        for weights in (importance, None):
            losses = squares.sum(-1) if weights is None else (squares * weights).sum(-1)
            torch.testing.assert_close(grid.losses(rows, weights).double(), losses, rtol=1e-4, atol=1e-30)


@each_set
def test_halves_go_to_the_even_number(use, name: str) -> None:
    scheme = SCHEMES["w8a16"].with_group_size(64)
    weight = (torch.arange(-160, 160).float() + 0.5).reshape(5, 1, 64) * 0.25
    grid = Grid(scheme, torch.full((5, 1), 0.25).half())
    use(name)
    assert torch.equal(grid.errors(weight) + weight, (weight / 0.25).round().clamp(-128, 127) * 0.25)


@each_set
@pytest.mark.parametrize("scheme", [SCHEMES["w4a16"], SCHEMES["w4a16-asym"]])
def test_a_group_of_scale_zero_becomes_nothing(use, name: str, scheme: Scheme) -> None:
    scheme = scheme.with_group_size(24)
    grid = Grid(scheme, torch.zeros(3, 2).half(), None if scheme.symmetric else torch.zeros(3, 2))
    weight = torch.zeros(3, 2, 24)
    use(name)
    assert (grid.errors(weight) == 0).all() and (grid.losses(weight, None) == 0).all()


@each_set
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_not_hidden(use, name: str, bad: float) -> None:
    scheme = SCHEMES["w4a16"].with_group_size(24)
    grid = fit_grid(grouped(weight_of(3), scheme), scheme)
    weight = grouped(weight_of(3), scheme).clone()
    weight[1, 2, 17] = bad
    use(TORCH)
    errors = grid.errors(weight)
    use(name)
    torch.testing.assert_close(grid.errors(weight), errors, equal_nan=True)
    losses = grid.losses(weight, None)
    assert not losses[1, 2].isfinite() and losses.isfinite().sum() == losses.numel() - 1


@each_set
def test_a_weight_may_lie_anywhere_and_be_empty(use, name: str) -> None:
    scheme = SCHEMES["w4a16-asym"].with_group_size(24)
    rows = grouped(weight_of(10), scheme)
    grid = fit_grid(rows, scheme)
    use(name)
    strided = rows.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert torch.equal(grid.errors(strided), grid.errors(rows))
    assert torch.equal(grid.losses(strided, None), grid.losses(rows, None))
    fitted = fit_grid(strided, scheme, torch.ones(strided.shape[1:]), steps=5)  # its scales are not contiguous either
    assert torch.equal(fitted.scale, fit_grid(rows, scheme, torch.ones(rows.shape[1:]), steps=5).scale)
    nothing = Grid(scheme, torch.empty(0, 24).half(), torch.empty(0, 24))
    assert nothing.errors(torch.empty(0, 24, 24)).shape == (0, 24, 24)


@each_set
@pytest.mark.parametrize("type_name", ["q6_k", "q5_0", "w8a8"])
def test_grids_of_other_integers_are_torchs_too(use, name: str, type_name: str) -> None:
    """Scales on two levels, which may be negative; scales in float32; groups as wide as a row."""
    scheme = SCHEMES[type_name]
    rows = grouped(weight_of(17)[:, :512], scheme)
    use(TORCH)
    grid = fit_grid(rows, scheme)
    expected = grid.errors(rows)
    use(name)
    assert grid._kernels() is KERNELS[name]
    assert ((grid.errors(rows) - expected).abs() <= EPS * (expected.abs() + 2 * rows.abs())).all()


@pytest.mark.parametrize("type_name", ["nvfp4", "mxfp4", "fp8", "q4_1", "q4_k"])
def test_numbers_that_are_no_integers_and_minimums_are_left_to_torch(use, type_name: str) -> None:
    use(next(iter(KERNELS)))
    scheme = SCHEMES[type_name]
    assert fit_grid(grouped(weight_of(4)[:, :512], scheme), scheme)._kernels() is None


# GPTQ's loop


def rounding_of(scheme: Scheme, outputs: int, start: int, pieces: tuple[int, ...]):
    """The weight [in, out] in order, its grid, and what `round_inputs` makes of the block that begins at `start`,
    asked for in pieces: numbers and errors."""
    weight = weight_of(outputs, seed=outputs)
    fitted = fit_grid(grouped(weight, scheme), scheme)
    group = torch.arange(WIDTH) // (WIDTH // fitted.scale.shape[1])
    order = hessian().order
    grid = _Fixed(fitted, group[order])
    ordered = weight.T[order].contiguous()
    numbers, errors = torch.full_like(ordered, torch.nan), torch.full((BLOCK, outputs), torch.nan)
    for first, last in zip((start, *pieces), pieces, strict=False):
        round_inputs(ordered, hessian().factor, grid, numbers, errors, start, first, last)
    return ordered, grid, numbers, errors


@pytest.mark.parametrize("name", [*KERNELS, TORCH])
@each_scheme
@pytest.mark.parametrize("size", SIZES)
def test_each_input_is_rounded_as_the_paper_says(use, name: str, scheme: Scheme, size: int) -> None:
    """Given the errors of the inputs before it; so that a tie that falls the other way excuses nothing that follows."""
    use(name)
    scheme = scheme.with_group_size(size)
    for outputs in OUTPUTS:
        for start, stop in ((0, BLOCK), (512, WIDTH)):
            weight, grid, numbers, errors = rounding_of(scheme, outputs, start, (stop,))
            block, errors = slice(start, stop), errors[: stop - start].double()
            assert numbers[:start].isnan().all() and numbers[stop:].isnan().all()  # nothing else is touched
            factor = hessian().factor[block, block].double()
            earlier = factor.triu(1).T
            own = weight[block].double() - earlier @ errors
            allowed = 2 * BLOCK * EPS * (weight[block].abs().double() + earlier.abs() @ errors.abs())
            scale, zero = (t[grid.group_of_input[block]].double() for t in (grid.scale, grid.zero))
            place, number = zero + own / scale, numbers[block].double()
            assert torch.equal(number, number.round().clamp(0, scheme.largest_code))
            off = (place.clamp(0, scheme.largest_code) - number).abs()
            assert (off <= 0.5 + allowed / scale + EPS * (zero + place.abs())).all()
            left = own - (number - zero) * scale
            diagonal = factor.diagonal()[:, None]
            rounding = allowed + EPS * (own.abs() + ((number - zero) * scale).abs() + left.abs())
            assert ((errors * diagonal - left).abs() <= 2 * rounding).all()


@each_set
@pytest.mark.parametrize("outputs", OUTPUTS)
def test_neither_pieces_nor_threads_change_a_bit(use, monkeypatch, name: str, outputs: int) -> None:
    use(name)
    scheme = SCHEMES["w4a16"].with_group_size(64)
    _, _, numbers, errors = rounding_of(scheme, outputs, 128, (256,))
    _, _, in_pieces, their_errors = rounding_of(scheme, outputs, 128, (129, 140, 140, 255, 256))
    monkeypatch.setattr(gptq_module, "multiplier", lambda: _cpu.Multiplier(1, name))
    _, _, alone, own_errors = rounding_of(scheme, outputs, 128, (256,))
    for others, those in ((in_pieces, their_errors), (alone, own_errors)):
        assert torch.equal(others[128:256], numbers[128:256]) and torch.equal(those, errors)


@each_set
def test_an_output_that_is_not_finite_harms_no_other(use, name: str) -> None:
    use(name)
    scheme = SCHEMES["w4a16"].with_group_size(32)
    weight = weight_of(70).T.contiguous()
    grid = _Fixed(fit_grid(grouped(weight_of(70), scheme), scheme), torch.arange(WIDTH) // 32)
    found = []
    for bad in (0.0, torch.nan):
        weight[3, 66] = bad
        numbers, errors = torch.zeros_like(weight), torch.empty(BLOCK, 70)
        round_inputs(weight, hessian().factor, grid, numbers, errors, 0, 0, BLOCK)
        found.append(errors)
    others = torch.arange(70) != 66
    assert torch.equal(found[0][:, others], found[1][:, others])
    assert found[1][3:, 66].isnan().all() and torch.equal(found[0][:3], found[1][:3])


CASES = [
    (1, 8), (1, 576), (15, 16), (15, 64), (17, 32), (17, 576), (63, 64), (63, 8), (65, 48), (65, 32), (100, 16),
    (100, 576),
]  # fmt: skip


@cache
def quantized_by_torch(scheme: Scheme, outputs: int, desc_act: bool):
    return gptq(weight_of(outputs, seed=outputs), hessian(), scheme, desc_act)


@each_set
@pytest.mark.parametrize("scheme", [SCHEMES["w4a16"], SCHEMES["w4a16-asym"]])
@pytest.mark.parametrize("desc_act", [False, True])
@pytest.mark.parametrize(("outputs", "size"), CASES)
def test_gptq_is_as_good_as_torchs(use, name: str, scheme: Scheme, desc_act: bool, outputs: int, size: int) -> None:
    scheme = scheme.with_group_size(size)
    weight = weight_of(outputs, seed=outputs)
    use(TORCH)
    expected = quantized_by_torch(scheme, outputs, desc_act)
    use(name)
    found = gptq(weight, hessian(), scheme, desc_act)

    def loss(quantized) -> float:
        difference = quantized.dequantize() - weight
        return float((difference @ gram() * difference).sum())

    assert loss(found) <= 1.01 * loss(expected)
    assert found.codes.shape == expected.codes.shape and (found.group_index is None) == (not desc_act)
    if desc_act:
        assert torch.equal(found.group_index, expected.group_index)


# What the kernels refuse


def arrays(**changed: torch.Tensor) -> list[torch.Tensor]:
    given = {
        "weight": torch.ones(4, 3),
        "factor": torch.eye(4),
        "group": torch.tensor([0, 0, 1, 1]),
        "scale": torch.ones(2, 3),
        "zero": torch.zeros(2, 3),
        "numbers": torch.zeros(4, 3),
        "errors": torch.zeros(4, 3),
    }
    return list((given | changed).values())


@pytest.mark.parametrize(
    "changed",
    [
        {"factor": torch.eye(3)},
        {"group": torch.tensor([0, 0, 1, 2])},
        {"group": torch.tensor([0, 0, 1, -1])},
        {"group": torch.tensor([0, 0, 1])},
        {"scale": torch.ones(2, 4)},
        {"zero": torch.zeros(1, 3)},
        {"numbers": torch.zeros(3, 3)},
        {"numbers": torch.zeros(4, 6)[:, ::2]},
        {"numbers": torch.zeros(4, 3).half()},
        {"errors": torch.zeros(3, 3)},
        {"errors": torch.zeros(3, 4).T},
    ],
)
def test_arrays_that_do_not_fit_each_other_are_refused(changed: dict[str, torch.Tensor]) -> None:
    kernels = next(iter(KERNELS.values()))
    kernels.round_inputs(*arrays(), 0, 0, 4, 15)
    with pytest.raises((ValueError, TypeError)):
        kernels.round_inputs(*arrays(**changed), 0, 0, 4, 15)


@pytest.mark.parametrize("span", [(-1, 0, 4), (1, 0, 4), (0, 3, 2), (0, 0, 5)])
def test_spans_outside_the_block_are_refused(span: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="block"):
        next(iter(KERNELS.values())).round_inputs(*arrays(), *span, 15)


@pytest.mark.parametrize(
    ("errors", "losses"),
    [
        (torch.zeros(2, 3, 5), None),
        (torch.zeros(2, 3, 8)[..., ::2], None),
        (torch.zeros(2, 3, 4).double(), None),
        (None, torch.zeros(3, 2)),
        (None, torch.zeros(3, 2).T),
    ],
)
def test_errors_that_could_not_be_written_are_refused(errors, losses) -> None:
    kernels = next(iter(KERNELS.values()))
    weight, scale, zero = torch.ones(2, 3, 4), torch.ones(2, 3), torch.zeros(2, 3)
    with pytest.raises((ValueError, TypeError)):
        kernels.grid_errors(weight, scale, zero, None, errors, losses, 15)
