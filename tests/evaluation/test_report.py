"""`Report`: intervals that know which rows belong together, files that are checked, pages that are safe."""

import contextlib
import json
import math
import random
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import random_addition, tiny_model, tiny_tokenizer

from steerkit import Controller, Report, evaluate
from steerkit.errors import ArtefactError, MissingDependencyError, ReportError
from steerkit.evaluation.report import Arm, Estimate, Measure


def measure(rows: list[tuple[int, float]], shown: Any = "mean", weights: Any = ()) -> Measure:
    return Measure(tuple(v for _, v in rows), tuple(c for c, _ in rows), tuple(weights), "effect", shown)


def of(values: Any, **more: Any) -> Measure:
    """One row a prompt."""
    return measure(list(enumerate(map(float, values))), **more)


def arm(seed: int = 0, prompts: int = 6, samples: int = 2, texts: bool = True) -> Arm:
    generator = np.random.default_rng(seed)
    clusters = tuple(i for i in range(prompts) for _ in range(samples))
    lengths = tuple(float(n) for n in generator.integers(1, 9, len(clusters)))

    def made(kind: Any, shown: Any = "mean", weights: Any = ()) -> Measure:
        return Measure(tuple(generator.normal(size=len(clusters)).tolist()), clusters, weights, kind, shown)

    measures = {
        "sentiment": made("effect"),
        "kl": made("damage", weights=lengths),
        "kl_p90": made("damage", "p90"),
        "perplexity": made("damage", "exp", lengths),
    }
    shown = tuple(f"prompt {i}" for i in clusters) if texts else ()
    return Arm(
        measures, shown, tuple(f"text {seed} {i}" for i in range(len(clusters))) if texts else (), {"seed": seed}
    )


def report(*names: str) -> Report:
    return Report({name: arm(seed) for seed, name in enumerate(names or ("plain", "steered"))})


rows_of_prompts = st.lists(
    st.tuples(st.integers(0, 5), st.floats(-50, 50, allow_nan=False, width=32)), min_size=1, max_size=24
)


# ----------------------------------------------------------------------------------------------------------- figures


def test_figures_by_hand() -> None:
    rows = [(0, 1.0), (0, 3.0), (1, 5.0), (2, 11.0)]
    assert measure(rows).estimate.value == pytest.approx(5.0)
    assert measure(rows, weights=(1.0, 1.0, 2.0, 4.0)).estimate.value == pytest.approx((1 + 3 + 10 + 44) / 8)
    assert measure(rows, "exp").estimate.value == pytest.approx(math.exp(5.0))
    assert measure(rows, "p90").estimate.value == pytest.approx(np.quantile([1, 3, 5, 11], 0.9))


@settings(max_examples=8, deadline=None)
@given(rows=rows_of_prompts, shown=st.sampled_from(["mean", "p90"]), weighted=st.booleans(), data=st.data())
def test_the_order_of_rows_changes_nothing(rows: Any, shown: Any, weighted: bool, data: Any) -> None:
    weights = [float(1 + index % 5) for index in range(len(rows))] if weighted else []
    order = data.draw(st.permutations(range(len(rows))))
    first = measure(rows, shown, weights)
    second = measure([rows[i] for i in order], shown, [weights[i] for i in order] if weighted else [])
    assert second.estimate == pytest.approx(first.estimate, abs=1e-9, rel=1e-9, nan_ok=True)
    assert first.against(second).value == pytest.approx(0.0, abs=1e-9)


@settings(max_examples=25, deadline=None)
@given(rows=rows_of_prompts, shown=st.sampled_from(["mean", "p90", "exp"]), times=st.integers(2, 4))
def test_rows_that_stand_twice_tell_nothing_new(rows: Any, shown: Any, times: int) -> None:
    rows = [(cluster, value / 10) for cluster, value in rows]
    once, often = measure(rows, shown).estimate, measure(rows * times, shown).estimate
    if shown != "p90":  # a quantile between two values moves when each stands twice
        assert often == pytest.approx(once, rel=1e-6, abs=1e-9, nan_ok=True)
    elif len({cluster for cluster, _ in rows}) > 1:
        assert often.low <= often.value + 1e-9
        assert often.value <= often.high + 1e-9 or often.high == pytest.approx(often.value)


@settings(max_examples=25, deadline=None)
@given(rows=rows_of_prompts, shown=st.sampled_from(["mean", "p90", "exp"]))
def test_an_interval_lies_within_the_values(rows: Any, shown: Any) -> None:
    found = measure(rows, shown).estimate
    change = math.exp if shown == "exp" else float
    least, most = (change(f(v for _, v in rows)) for f in (min, max))
    slack = 1e-6 * (abs(least) + abs(most)) + 1e-9
    assert least - slack <= found.value <= most + slack
    if len({cluster for cluster, _ in rows}) > 1:
        assert least - slack <= found.low <= found.high <= most + slack


def test_the_interval_is_of_prompts_and_not_of_rows() -> None:
    generator = np.random.default_rng(1)
    means = generator.normal(size=20)
    one = of(means).estimate
    many = measure([(c, float(m)) for c, m in enumerate(means) for _ in range(50)]).estimate
    assert many == pytest.approx(one)
    loose = of(np.repeat(means, 50)).estimate
    assert loose.high - loose.low < 0.3 * (many.high - many.low)


def test_the_interval_is_about_that_of_the_t_distribution() -> None:
    values = np.random.default_rng(2).normal(3.0, 2.0, size=100)
    found = of(values).estimate
    half = 1.984 * values.std(ddof=1) / 10
    assert (found.low, found.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.12)


@pytest.mark.parametrize("skewed", [False, True])
def test_it_covers_the_truth_about_as_often_as_it_says(skewed: bool) -> None:
    generator = np.random.default_rng(3)
    hits = 0
    for _ in range(200):
        prompts = generator.exponential(size=30) if skewed else generator.normal(1.0, 1.0, size=30)
        counts = generator.integers(1, 4, 30)
        rows = [(c, float(generator.normal(prompts[c], 0.5))) for c in range(30) for _ in range(counts[c])]
        found = measure(rows).estimate
        hits += found.low <= 1.0 <= found.high
    assert (0.87 if skewed else 0.90) <= hits / 200 <= 0.99


def test_paired_differences_cover_too_and_are_narrower() -> None:
    generator = np.random.default_rng(4)
    hits = 0
    for _ in range(200):
        base = generator.normal(0.0, 5.0, size=30)
        first, second = of(base + generator.normal(0.7, 1.0, 30)), of(base + generator.normal(0.0, 1.0, 30))
        found = first.against(second)
        hits += found.low <= 0.7 <= found.high
        assert found.high - found.low < 0.6 * (first.estimate.high - first.estimate.low)
    assert 0.90 <= hits / 200 <= 0.99


@settings(max_examples=40, deadline=None)
@given(values=st.lists(st.floats(-9, 9), min_size=2, max_size=12), step=st.floats(-3, 3))
def test_an_equal_step_everywhere_has_no_spread(values: list[float], step: float) -> None:
    first, second = of([v + step for v in values]), of(values)
    assert tuple(first.against(second)) == pytest.approx((step, step, step), abs=1e-9)
    ratio = of([v + step for v in values], shown="exp").against(of(values, shown="exp"))
    assert tuple(ratio) == pytest.approx((math.exp(step),) * 3, rel=1e-9)


def test_differences_turn_round() -> None:
    both = report()
    for key in both.measures:
        there, back = both.difference(key, "steered", "plain"), both.difference(key, "plain", "steered")
        if key == "perplexity":
            assert (1 / back.value, 1 / back.high, 1 / back.low) == pytest.approx(there)
            assert there.value == pytest.approx(both["steered"][key].value / both["plain"][key].value)
        else:
            assert (-back.value, -back.high, -back.low) == pytest.approx(there)
            assert there.value == pytest.approx(both["steered"][key].value - both["plain"][key].value)
        assert there.low <= there.value <= there.high


@pytest.mark.parametrize("shown", ["mean", "exp", "p90"])
def test_one_prompt_has_no_interval(shown: Any) -> None:
    one = measure([(7, 1.0), (7, 2.0)], shown)
    for found in (one.estimate, one.against(one)):
        assert math.isfinite(found.value)
        assert math.isnan(found.low)
        assert math.isnan(found.high)


def test_figures_are_the_same_each_time_and_touch_no_generator() -> None:
    state, plain = np.random.get_state()[1].tolist(), random.getstate()
    assert report().figures("plain") == report().figures("plain")
    assert (np.random.get_state()[1].tolist(), random.getstate()) == (state, plain)


@pytest.mark.parametrize(
    ("values", "clusters", "weights"),
    [
        ((), (), ()),
        ((1.0,), (0, 1), ()),
        ((1.0, 2.0), (0, 1), (1.0,)),
        ((math.nan,), (0,), ()),
        ((math.inf,), (0,), ()),
        ((1.0,), (0,), (math.nan,)),
    ],
)
def test_a_measure_is_whole(values: Any, clusters: Any, weights: Any) -> None:
    with pytest.raises(ReportError):
        Measure(values, clusters, weights)


@pytest.mark.parametrize("weights", [(0.0, 0.0), (-1.0, 2.0)])
def test_weights_are_positive(weights: Any) -> None:
    with pytest.raises(ReportError):
        Measure((1.0, 2.0), (0, 1), weights)


def test_a_perplexity_beyond_all_numbers_is_a_figure_still() -> None:
    found = of([720.0, 730.0], shown="exp").estimate
    assert found.value == math.inf


# ----------------------------------------------------------------------------------------------------- arms and names


def test_join_keeps_every_arm_in_order() -> None:
    joined = Report.join(report("a", "b"), report("c"))
    assert list(joined) == ["a", "b", "c"]
    assert len(joined) == 3
    assert "a" in repr(joined)
    assert joined.measures == ["sentiment", "kl", "kl_p90", "perplexity"]


def test_join_refuses_doubles_and_nothing() -> None:
    with pytest.raises(ReportError, match="'b' twice"):
        Report.join(report("a", "b"), report("b"))
    with pytest.raises(ReportError):
        Report.join()


def test_what_is_not_there_is_named() -> None:
    both = report()
    for call in (
        lambda: both["other"],
        lambda: both.difference("kl", "other", "plain"),
        lambda: both.difference("kl", "plain", "other"),
        lambda: both.table("other"),
        lambda: both.figures("other"),
    ):
        with pytest.raises(ReportError, match=r"'other'.*plain, steered"):
            call()
    for call in (lambda: both["plain"]["other"], lambda: both.difference("other", "steered", "plain")):
        with pytest.raises(ReportError, match=r"'other'.*sentiment"):
            call()


def test_save_html_refuses_an_unknown_base_and_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(ReportError):
        report().save_html(tmp_path / "r.html", base="other")
    assert not list(tmp_path.iterdir())


def test_a_measure_that_one_arm_lacks_is_left_out() -> None:
    less = Report({"plain": Arm({"kl": of([1.0, 2.0])}), "steered": Arm({"kl": of([2.0, 2.0]), "s": of([1.0, 2.0])})})
    assert list(less.figures("plain")["steered"]) == ["kl"]
    with pytest.raises(ReportError):
        less.difference("s", "steered", "plain")
    assert less.table("plain").count("|\n") >= 4


def test_another_number_of_prompts_cannot_be_compared() -> None:
    with pytest.raises(ReportError, match="6 and 5"):
        Report({"a": arm(0), "b": arm(1, prompts=5)}).difference("kl", "a", "b")


def test_another_number_of_samples_can_be() -> None:
    both = Report({"a": arm(0, samples=1), "b": arm(1, samples=3)})
    found = both.difference("kl", "a", "b")
    assert found.low < found.value < found.high


@pytest.mark.parametrize("through_json", [False, True])
def test_arms_of_other_prompts_cannot_be_compared(through_json: bool) -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    first, second = (
        evaluate(model, tokenizer, prompts, name=name, neutral=(), task=(), max_new_tokens=2)
        for name, prompts in (("a", ["w1", "w2"]), ("b", ["w3 w4", "w5"]))
    )
    if through_json:
        first, second = (Report.from_json(each.to_json()) for each in (first, second))
    with pytest.raises(ReportError):
        Report.join(first, second).difference("kl", "a", "b")


def test_arms_of_other_questions_cannot_be_compared() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    given_: dict[str, Any] = {"task": (), "max_new_tokens": 2}
    first = evaluate(model, tokenizer, ["w1", "w2"], name="a", neutral=["w1 w2", "w3 w4"], **given_)
    second = evaluate(model, tokenizer, ["w1", "w2"], name="b", neutral=["w8 w9", "w7 w5"], **given_)
    with pytest.raises(ReportError):
        Report.join(first, second).difference("collateral", "a", "b")


# --------------------------------------------------------------------------------------------------------------- tables


def test_tables() -> None:
    lines = report().table().splitlines()
    assert len(lines) == 4
    assert [cell.strip() for cell in lines[0].strip("|").split("|")] == ["arm", *report().measures]
    assert all(line.count("|") == 6 for line in lines)
    assert lines[2].startswith("| plain | ")
    assert str(report()["plain"]["kl"]) in lines[2]
    whole = report().table(base="plain")
    assert whole.startswith(report().table())
    assert str(report().difference("perplexity", "steered", "plain")) in whole
    assert "ratio" in whole
    assert report("only").table(base="only").count("| only |") == 1


def test_an_estimate_reads_well() -> None:
    assert str(Estimate(0.123456, -1.0, 1234567.0)) == "0.123 [-1, 1.23e+06]"


@pytest.mark.parametrize("name", ["a | b", "a\nb"])
def test_names_do_not_break_the_table(name: str) -> None:
    lines = Report({name: Arm({"kl": of([1.0, 2.0])})}).table().splitlines()
    assert len(lines) == 3
    cells = [len(re.findall(r"(?<!\\)\|", line)) for line in lines]
    assert set(cells) == {3}


def test_to_pandas() -> None:
    pytest.importorskip("pandas")
    frame = report().to_pandas()
    assert list(frame.columns) == ["arm", "measure", "kind", "prompt", "value", "weight"]
    assert len(frame) == 2 * 4 * 12
    for name in ("plain", "steered"):
        part = frame[(frame.arm == name) & (frame.measure == "kl")]
        assert float((part.value * part.weight).sum() / part.weight.sum()) == pytest.approx(report()[name]["kl"].value)
        assert set(frame[(frame.arm == name) & (frame.measure == "sentiment")].weight) == {1.0}
    assert set(frame.kind) == {"effect", "damage"}


def test_to_pandas_without_pandas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(MissingDependencyError, match="pip install pandas"):
        report().to_pandas()


# ---------------------------------------------------------------------------------------------------------------- files


def test_json_keeps_every_figure(tmp_path: Path) -> None:
    both = report()
    path = tmp_path / "report.json"
    text = both.to_json(path)
    assert path.read_text() == text
    back = Report.from_json(text)
    assert back.figures() == both.figures()
    assert back.figures("plain") == both.figures("plain")
    assert back["plain"].settings == {"seed": 0}
    assert back["plain"].measures == both["plain"].measures
    assert "prompt 3" not in text
    assert "text 0 1" not in text
    assert back["plain"].completions == ()


def test_json_keeps_texts_on_request() -> None:
    names = {"ünïcode \u2028 </script>": arm(0)}
    back = Report.from_json(Report(names).to_json(texts=True))
    assert back == Report(names)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(0, 9), st.floats(-1e300, 1e300), st.floats(1e-3, 1e3)), min_size=1, max_size=9),
    name=st.text(max_size=8),
    texts=st.lists(st.text(max_size=8), min_size=9, max_size=9),
)
def test_json_round_trips(rows: Any, name: str, texts: list[str]) -> None:
    clusters, values, weights = (tuple(column) for column in zip(*rows, strict=True))
    made = Report({name: Arm({name: Measure(values, clusters, weights)}, tuple(texts), tuple(texts), {"a": 1})})
    assert Report.from_json(made.to_json(texts=True)) == made


def test_a_true_report_round_trips(tmp_path: Path) -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    prompts = ["w1 w2", "w3", "w4 w5 w6"]
    plain = evaluate(model, tokenizer, prompts, max_new_tokens=4, neutral=["w1 w2", "w4 w5"])
    with Controller(model, [random_addition(magnitude=6.0)]):
        steered = evaluate(model, tokenizer, prompts, max_new_tokens=4, neutral=["w1 w2", "w4 w5"])
    both = Report.join(plain, steered)
    back = Report.from_json(both.to_json())
    assert back.figures("unsteered") == both.figures("unsteered")
    assert Report.from_json(both.to_json(texts=True)) == both
    both.save_html(tmp_path / "r.html", base="unsteered", texts=True)
    page = Page((tmp_path / "r.html").read_text("utf-8"))
    assert all(text in page.text for text in both["steered"].completions)


def broken(**changes: Any) -> str:
    found = json.loads(report("a").to_json())
    part = found["arms"]["a"]["measures"]["kl"]
    for key, value in changes.items():
        if value is None:
            del part[key]
        else:
            part[key] = value
    return json.dumps(found)


def changed(**changes: Any) -> str:
    found = json.loads(report("a").to_json(texts=True))
    found["arms"]["a"].update(changes)
    return json.dumps(found)


HOSTILE: dict[str, Any] = {
    "nothing": "",
    "no JSON": "hello",
    "half": report("a").to_json()[:200],
    "null": "null",
    "a number": "3",
    "a list": "[]",
    "an object": "{}",
    "another kind": '{"steerkit": "concept", "arms": {}}',
    "no arms at all": '{"steerkit": "report"}',
    "arms as a list": '{"steerkit": "report", "arms": [1]}',
    "arms as null": '{"steerkit": "report", "arms": null}',
    "an arm as a number": '{"steerkit": "report", "arms": {"a": 1}}',
    "an arm without measures": '{"steerkit": "report", "arms": {"a": {}}}',
    "measures as a list": changed(measures=[1]),
    "a measure as a list": changed(measures={"kl": [1]}),
    "prompts as a number": changed(prompts=3),
    "settings as a number": changed(settings=3),
    "no values": broken(values=None),
    "empty values": broken(values=[]),
    "fewer values": broken(values=[1.0]),
    "fewer clusters": broken(clusters=[0]),
    "fewer weights": broken(weights=[1.0]),
    "values as text": broken(values=["1"] * 12),
    "values as lists": broken(values=[[1.0]] * 12),
    "values null": broken(values=[None] * 12),
    "NaN": broken(values=[math.nan] * 12),
    "Infinity": broken(values=[math.inf] * 12),
    "an unknown field": broken(other=1),
    "bytes that are no UTF-8": b"\xff\xfe\xff",
    "None": None,
    "a long integer": broken(values=[1.0] * 12).replace("[1.0,", "[" + "9" * 5000 + ",", 1),
    # these pass, or fail with an error of another kind
    "an arm of no kind": '{"steerkit": "report", "arms": {}}',
    "no measures in an arm": changed(measures={}),
    "deep": "[" * 200_000,
    "an integer beyond floats": broken(values=[10**400] * 12),
    "another kind of measure": broken(kind="benefit"),
    "shown otherwise": broken(shown="median"),
    "shown as a list": broken(shown=["exp"]),
    "clusters as mixed types": broken(clusters=["a", 1] * 6),
    "clusters as lists": broken(clusters=[[1]] * 12),
    "clusters null": broken(clusters=[None] * 12),
    "clusters as text": broken(clusters="012345012345"),
    "weights below zero": broken(weights=[-1.0] * 12),
    "weights of zero": broken(weights=[0.0] * 12),
    "truth values": broken(values=[True] * 12),
    "prompts as one text": changed(prompts="prompts"),
    "prompts that are no texts": changed(prompts=[1] * 12),
    "more prompts than completions": changed(prompts=["a"]),
    "completions that are no texts": changed(completions=[None] * 12),
}  # fmt: skip


@pytest.mark.parametrize(
    "case",
    HOSTILE,
)
def test_what_is_no_report_is_refused(case: str) -> None:
    with pytest.raises(ArtefactError):
        Report.from_json(HOSTILE[case])


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_mangled_report_is_a_report_or_refused(data: Any) -> None:
    text = report("a").to_json()
    start = data.draw(st.integers(0, len(text) - 1))
    length = data.draw(st.integers(0, 12))
    text = (
        text[:start] + data.draw(st.text(alphabet='{}[]",:0123456789.eE-nul \\', max_size=4)) + text[start + length :]
    )
    with contextlib.suppress(ArtefactError):
        Report.from_json(text)


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    for write in (report().to_json, report().save_html):
        with pytest.raises(ArtefactError):
            write(tmp_path / "no" / "such" / "folder")
        with pytest.raises(ArtefactError):
            write(tmp_path)


# ----------------------------------------------------------------------------------------------------------------- pages

NASTY = "<script>alert('x')</script> & \"quoted\" {0} {} %s </table>"


class Page(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.given: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.given += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


def nasty() -> Report:
    shown = Arm({NASTY: of([1.0, 2.0])}, (NASTY, "p"), ("SECRET" + NASTY, "q"))
    return Report({NASTY: shown, "base" + NASTY: shown})


@pytest.mark.parametrize("texts", [False, True])
@pytest.mark.parametrize("base", [None, "base" + NASTY])
def test_a_page_shows_everything_as_text(texts: bool, base: str | None, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    nasty().save_html(path, base=base, texts=texts)
    text = path.read_text("utf-8")
    page = Page(text)
    assert not {"script", "link", "img", "iframe", "object", "embed", "base"} & set(page.tags)
    assert not [key for key, _ in page.given if key in ("src", "href", "srcset", "action") or key.startswith("on")]
    assert "url(" not in text
    assert "@import" not in text
    assert "http" not in text
    assert NASTY in page.text
    assert ("SECRET" in text) == texts
    assert page.tags.count("table") == 1 + (base is not None) + 2 * texts
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_a_page_holds_the_figures(tmp_path: Path) -> None:
    both = report()
    both.save_html(tmp_path / "r.html", base="plain")
    page = Page((tmp_path / "r.html").read_text("utf-8"))
    for key in both.measures:
        assert str(both["steered"][key]) in page.text
        assert str(both.difference(key, "steered", "plain")) in page.text


def test_texts_are_hidden_by_default(tmp_path: Path) -> None:
    both = report()
    both.save_html(tmp_path / "r.html")
    assert "text 0" not in (tmp_path / "r.html").read_text()
    assert "prompt 0" not in (tmp_path / "r.html").read_text()
    assert "text 0" not in repr(both)
    assert "text 0" not in repr(both["plain"])
    assert "text 0" not in both.table("plain")


def test_a_report_is_frozen() -> None:
    both = report()
    with pytest.raises(AttributeError):
        both.arms = {}  # type: ignore[misc]
    with pytest.raises(AttributeError):
        both["plain"].completions = ()  # type: ignore[misc]
    with pytest.raises(TypeError):
        both["plain"] = arm()  # type: ignore[index]
