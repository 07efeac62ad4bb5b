"""How cost grows: fits of made-up points give their law, and the words say what was fitted."""

import json
import math
import os
import subprocess
import sys

import pytest

from benchmarks import bench_growth, growth_fit, growth_picture, op_classes
from benchmarks.growth_fit import Curve
from coati.utils.json_io import save_json

XS = [1.0, 2.0, 4.0, 8.0, 16.0]


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_the_exponent_of_a_power_law(power):
    assert growth_fit.exponent(XS, [3 * x**power for x in XS]) == pytest.approx(power)


def test_points_without_cost_have_no_exponent():
    assert growth_fit.exponent([1.0, 2.0, 4.0], [0.0, 2.0, 4.0]) == pytest.approx(1.0)
    assert math.isnan(growth_fit.exponent(XS, [0.0] * len(XS)))


@pytest.mark.parametrize(
    "law", [Curve(2.0, 3.0, 0.5), Curve(0.0, 3.0, 0.0), Curve(5.0, 0.0, 0.1), Curve(0.0, 0.0, 2.0)]
)
def test_a_curve_is_found_again_whatever_terms_it_lacks(law):
    found = growth_fit.curve(XS, [law.at(x) for x in XS])
    assert found == pytest.approx(law, abs=1e-9)
    assert growth_fit.largest_error(XS, [law.at(x) for x in XS], found) < 1e-9


def test_no_term_is_negative():
    # Best fit by a falling parabola, were that allowed.
    found = growth_fit.curve(XS, [math.log(1 + x) for x in XS])
    assert min(found) >= 0 and found.quadratic == 0


def test_units_do_not_matter():
    law = Curve(2.0, 3e-6, 5e-13)
    xs = [1e6 * x for x in XS]
    assert growth_fit.curve(xs, [law.at(x) for x in xs]) == pytest.approx(law, rel=1e-6)


def test_a_curve_of_degree_one_has_no_quadratic_term():
    found = growth_fit.curve([1.0, 2.0], [3.0, 5.0], degree=1)
    assert found == pytest.approx(Curve(1.0, 2.0, 0.0))


def test_one_point_or_no_cost_is_no_curve():
    for xs, ys in (([1.0], [1.0]), ([1.0, 2.0], [1.0, 0.0])):
        with pytest.raises(ValueError, match="two points of positive cost"):
            growth_fit.curve(xs, ys)


def test_where_a_curve_is_linear():
    law = Curve(1.0, 2.0, 0.0)
    low = law.linear_from()
    assert low == pytest.approx(4.5)  # 1 of 1 + 9
    assert law.linear_to() == math.inf
    both = Curve(1.0, 2.0, 0.25)
    high = both.linear_to()
    assert both.quadratic * high**2 == pytest.approx(0.1 * both.at(high))
    assert Curve(0.0, 1.0, 0.0).linear_from() == 0
    assert Curve(1.0, 0.0, 1.0).linear_from() == math.inf


def points_of(law: dict[str, Curve]) -> list[dict]:
    """Points whose parts grow as ``law`` says, of lengths 128 to 4096."""
    found = []
    for x in (128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0):
        parts = {part: one.at(x) for part, one in law.items()}
        whole = sum(parts.values())
        row = {"x": x, "seconds": whole, "mib": 100 + x, "parts": parts, "parameters": 2**20}
        found.append(row)
    return found


LAW = {
    op_classes.PRODUCTS: Curve(0.0, 1e-3, 0.0),
    op_classes.ATTENTION: Curve(0.0, 0.0, 1e-6),
    op_classes.OPTIMIZER: Curve(0.08, 0.0, 0.0),
    op_classes.WAITING: Curve(1e-6, 0.0, 0.0),
}


def test_growth_finds_the_law_of_the_whole_and_of_every_part_that_matters():
    found = bench_growth.growth(points_of(LAW))
    assert found["seconds"]["constant"] == pytest.approx(0.08, rel=1e-3)
    assert found["seconds"]["quadratic"] == pytest.approx(1e-6)
    assert set(found["parts"]) == set(LAW) - {op_classes.WAITING}
    assert found["parts"][op_classes.ATTENTION]["exponent"] == pytest.approx(2.0)


def test_the_words_name_the_parts_that_bend_the_curve():
    said = "\n".join(
        bench_growth.explained("length", "tokens", bench_growth.growth(points_of(LAW)))
    )
    assert "memory grows as" in said
    first = 0.08 / (0.08 + 0.128 + 128**2 * 1e-6)
    assert (
        f"the constant term is {first:.0%} of a step at 128 (0.080 s), by part: optimizer" in said
    )
    last = 16.777 / (16.777 + 4.096 + 0.08)
    assert (
        f"the quadratic term is {last:.0%} of a step at 4096 (16.777 s), by part: attention" in said
    )
    assert "the part that grows fastest is attention, x^2.00" in said
    assert "16 of 228 MiB at 128, 16 of 4196 at 4096" in said


def test_the_words_say_where_it_is_linear():
    points = [{"x": 1.0}, {"x": 10.0}]

    def where(low: float, high: float) -> str:
        return bench_growth._where({"linear_from": low, "linear_to": high}, points)

    assert where(0.0, math.inf) == "linear from the first point on, to the last point"
    assert where(2.0, 5.0) == "linear from 2 on, up to 5"
    assert where(20.0, math.inf).endswith("everywhere (it would be from 20 on)")
    assert where(math.inf, math.inf).endswith("more than a tenth everywhere")
    assert "quadratic term is more than a tenth everywhere" in where(0.0, 0.5)
    both = "linear nowhere here: the constant is more than a tenth {}, the quadratic term from 5 on"
    assert where(8.0, 5.0) == both.format("up to 8")
    assert where(20.0, 5.0) == both.format("everywhere")


def test_large_numbers_are_written_out():
    assert [growth_fit.plain(x) for x in (1643.2, 661.4, 0.5, 396_931)] == [
        "1,640",
        "661",
        "0.5",
        "397,000",
    ]


def test_another_law_gives_another_explanation():
    flat = LAW | {op_classes.ATTENTION: Curve(0.0, 1e-4, 0.0)}
    said = "\n".join(
        bench_growth.explained("length", "tokens", bench_growth.growth(points_of(flat)))
    )
    assert "the quadratic term" not in said and "to the last point" in said


def test_the_picture_shows_every_axis_and_is_the_same_twice():
    axes = {"length": bench_growth.growth(points_of(LAW)) | {"what": "tokens of the row"}}
    axes["rows"] = bench_growth.growth([{"x": x, "seconds": 1 + x, "mib": 5.0} for x in XS]) | {
        "what": "rows of a preparation"
    }
    drawn = growth_picture.draw(axes)
    named = ("tokens of the row", "rows of a preparation", "attention", "rows: memory as x^0.00")
    assert all(text in drawn for text in named)
    assert growth_picture.draw(axes) == drawn


def test_every_axis_grows_by_itself():
    for name, (_, points) in bench_growth.AXES.items():
        xs = [point.x for point in points()]
        assert xs == sorted(xs) and len(xs) >= 4, name
    tokens = {point.rows * point.length for point in bench_growth.vocabularies()}
    assert tokens == {bench_growth.TOKENS}
    for point in bench_growth.sizes():
        heads = point.model["num_attention_heads"]
        assert heads % point.model["num_key_value_heads"] == 0
        assert point.model["hidden_size"] % heads == 0


PROGRAM = """
import sys
from benchmarks import bench_growth
from benchmarks.bench_growth import MODEL, Point
tiny = MODEL | {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
                "num_key_value_heads": 1, "intermediate_size": 64, "vocab_size": 97}
points = [Point(n, tiny, 1, n) for n in (16, 64)]
bench_growth.AXES["length"] = ("tokens of the row", lambda: points)
sys.argv = ["bench_growth.py", "length", "--steps", "1", "--output", sys.argv[1],
            "--picture", sys.argv[2]]
bench_growth.main()
"""


def test_tiny_models_go_through_it(tmp_path):
    output = tmp_path / "found.json"
    picture = tmp_path / "found.svg"
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", PROGRAM, str(output), str(picture)]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=280)
    assert done.returncode == 0, done.stderr
    found = json.loads(output.read_text())["axes"]["length"]
    assert [point["x"] for point in found["points"]] == [16, 64]
    for point in found["points"]:
        assert point["mib"] > 0
        assert sum(point["parts"].values()) == pytest.approx(point["seconds"])
    assert op_classes.DISPATCH in found["parts"]
    assert "<svg" in picture.read_text() and "length (tokens of the row), 16 to 64:" in done.stdout


def test_axes_of_earlier_runs_are_kept_unless_they_are_of_another_machine(tmp_path):
    output = str(tmp_path / "found.json")
    here = {"cpu": "a", "cores": 2, "threads": 2, "torch": "2"}
    assert bench_growth.kept(None, here) == bench_growth.kept(output, here) == {}
    save_json({"machine": here | {"load": 1.0}, "axes": {"size": {"what": "weights"}}}, output)
    assert bench_growth.kept(output, here | {"load": 2.0}) == {"size": {"what": "weights"}}
    with pytest.raises(ValueError, match="holds figures of threads 2, and here it is 1"):
        bench_growth.kept(output, here | {"threads": 1})


def test_a_point_that_fails_is_named(monkeypatch):
    def broken(point, steps):
        raise RuntimeError("no memory")

    monkeypatch.setattr(bench_growth, "measured", broken)
    with pytest.raises(ValueError, match="the step at 7 failed: RuntimeError: no memory"):
        bench_growth.in_fork(bench_growth.Point(7, {}, 1, 1), 1)
