"""The report: its figures against hand computations, the page's form, and recipes that lack parts."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from itertools import pairwise

import pytest
import recipe_records
import tiny
import yaml

from stages.report import report, tables
from stages.report.facts import average, busy, collect, gains, origin, parameter_count, retention, win_rates, work
from stages.report.lineage import WIDE, WIDTH, Node, graph, place
from stages.report.svg import spread
from stages.stage import CuveeError

VOID = {"meta", "br", "link", "img", "input", "hr"}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return recipe_records.whole(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def facts(inputs):
    return collect(inputs["scores"], [inputs["export"], inputs["corpus"]])


def make(inputs, folder, **config):
    folder.mkdir()
    metrics = report.run(report.Config(**config), inputs, folder, tiny.context(folder.with_name("scratch")))
    return metrics, {path.name: path.read_text(encoding="utf-8") for path in folder.iterdir()}


@pytest.fixture(scope="module")
def made(inputs, tmp_path_factory):
    return make(inputs, tmp_path_factory.mktemp("report") / "out")


class Page(HTMLParser):
    """Checks that tags are balanced; collects classes, texts and whatever could reach out of the page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.reaches: list[str] = []
        self.ids: set[str] = set()
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "action", "data") and not (value or "").startswith("#"):
                self.reaches.append(f"{tag} {name}={value}")
            if name == "id":
                self.ids.add(value)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_and_reaches_nowhere(made):
    text = made[1]["report.html"]
    page = Page(text)
    assert page.reaches == []
    assert not re.search(r"https?://|//[a-z]|url\(|@import|@font-face", text)
    sections = {
        "matrix",
        "claims",
        "gains",
        "retention",
        "wins",
        "judge",
        "length-1",
        "perplexity",
        "curves",
        "samples",
        "lineage",
        "data",
        "time",
    }
    assert page.ids == sections
    assert set(re.findall(r'href="#([\w-]+)"', text)) == sections
    assert len(text) < 600_000


def test_bytes_are_a_function_of_the_inputs(inputs, made, tmp_path):
    assert make(inputs, tmp_path / "again") == made


def test_what_models_and_documents_say_is_escaped(made):
    text = made[1]["report.html"]
    assert "the answer &lt;0&gt;" in text and "the answer <0>" not in text
    assert "def &lt;fix&gt;" in text


def test_the_page_shows_thresholds_and_what_was_changed(made):
    text = made[1]["report.html"]
    assert "38: 4 · 45: 5 · <b>50: 6</b> · 55: 6 · 62: 9" in text and "turns at 45: number of words: 47" in text and "&lt;uu&gt;" in text
    assert "Ã©\n→\né" in text


def test_the_spine_goes_from_the_first_model_to_the_exported_one(facts):
    assert facts.spine == [
        "pretrained",
        "base",
        "instruct",
        "sft-soup",
        "rl-soup",
        "best-of-n",
        "preference",
        "online",
        "polished",
    ]
    assert {name: model.parent for name, model in facts.models.items()}["rl-math"] == "sft-soup"
    assert [(soup.name, sorted(experts)) for soup, experts in facts.soups()] == [
        ("sft-soup", facts.domains), ("rl-soup", facts.domains)]  # fmt: skip


def test_gains_are_paired_differences_of_neighbours(facts):
    row = next(row for row in gains(facts) if row["model"] == "sft-soup")
    assert row["before"] == "instruct"
    before, after = facts.models["instruct"], facts.models["sft-soup"]
    assert row["domains"]["math"][0] == pytest.approx(after.score("math")[0] - before.score("math")[0])
    assert row["mean"][0] == pytest.approx(after.mean(facts.domains)[0] - before.mean(facts.domains)[0])
    assert row["mean"][2] - row["mean"][1] < row["domains"]["math"][2] - row["domains"]["math"][1]


def test_retention_is_the_share_of_the_experts_gain(facts):
    row = next(row for row in retention(facts) if (row["soup"], row["domain"]) == ("sft-soup", "code"))
    scores = {name: facts.models[name].score("code")[0] for name in ("instruct", "sft-code", "sft-soup")}
    assert (row["before"], row["alone"], row["blended"]) == tuple(scores.values())
    expected = (scores["sft-soup"] - scores["instruct"]) / (scores["sft-code"] - scores["instruct"])
    assert row["share"] == pytest.approx(expected)
    assert len(retention(facts)) == 12


def test_win_rates_are_of_the_same_prompts(facts):
    row = win_rates(facts)[0]
    ours, theirs = facts.models["polished"].samples, facts.models["pretrained"].samples
    won = sum(ours[i]["reward_model"] > theirs[i]["reward_model"] for i in ours) / len(ours)
    assert row["model"] == "pretrained" and row["final"][0] == pytest.approx(won)


def test_average_adds_errors_in_quadrature():
    assert average([(0.5, 0.2, 0.9), (0.7, 0.3, 1.0)]) == pytest.approx((0.6, 0.35, 0.85))


def test_busy_time_leaves_out_waiting():
    def record(start, end):
        return {"started": f"2026-01-05T10:{start:02d}:00+00:00", "ended": f"2026-01-05T10:{end:02d}:00+00:00"}

    spans = busy([record(40, 50), record(0, 10), record(5, 12), record(45, 48)])
    assert [end - start for start, end in spans] == [720.0, 600.0]


def test_work_counts_floating_point_operations(facts):
    record = facts.models["pretrained"].record
    done = work(record, parameter_count(facts))
    assert done["tokens"] == 2_400_000 and done["core_seconds"] == 236
    assert done["flops"] == 6 * 1_311_872 * 2_400_000


def test_lineage_puts_parents_above_their_children(facts):
    nodes = graph(facts.records)
    assert all(nodes[parent].layer < node.layer for node in nodes for parent in node.parents)
    titles = [node.title for node in nodes]
    assert "prompts ×6" in titles and "polished" in titles and not any(title.startswith("scores") for title in titles)
    soup = nodes[titles.index("sft-soup")]
    weights = {titles[parent] for parent, flows in soup.parents.items() if flows}
    assert weights == {f"sft-{domain}" for domain in facts.domains}  # the base is only measured against


@pytest.mark.parametrize("left, middle, right", [(3, 6, 0), (0, 6, 3), (4, 1, 4), (9, 0, 0), (1, 0, 0), (5, 9, 5)])
def test_every_box_of_the_lineage_is_within_the_picture(left, middle, right):
    """A layer of samples left of models, and reward models right of them."""
    kinds = ["pairs"] * left + ["checkpoint"] * middle + ["reward_model"] * right
    nodes = [Node([{"kind": kind}]) for kind in kinds]
    place(nodes)
    at = [node.x for node in nodes]
    assert min(at) >= WIDE / 2 - 1e-6 and max(at) <= WIDTH - WIDE / 2 + 1e-6
    assert all(b - a > 40 for a, b in pairwise(sorted(at)))


def test_spread_keeps_distance_and_order():
    placed = spread([10.0, 0.0, 10.0, 11.0], 5.0)
    assert placed[1] < placed[0] < placed[2] < placed[3] and placed[1] == pytest.approx(0.0, abs=2)
    ordered = sorted(placed)
    assert all(b - a >= 4.99 for a, b in pairwise(ordered))


def test_matrix_holds_what_a_terminal_shows(made, facts):
    found = json.loads(made[1]["matrix.json"])
    assert found["final"] == "polished" and found["spine"] == facts.spine
    assert found["steps"][-1]["model"] == "polished" and set(found["steps"][-1]["mean"]) == {"value", "low", "high"}
    assert found["models"]["sft-math"]["domains"]["math"]["value"] == facts.models["sft-math"].score("math")[0]
    assert made[0]["score"] == found["models"]["polished"]["mean"]["value"]


@pytest.mark.parametrize("number, said", [(0.0, ""), (1.25e9, "1.2e9"), (9.96e11, "1.0e12"), (3e21, "3.0e21")])
def test_operations_are_rounded_before_their_power_of_ten_is_told(number, said):
    assert tables._scientific(number) == said


def test_card_states_records_and_parses_as_yaml(made):
    card = made[1]["model_card.md"]
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front)["language"] == ["de", "en", "ja"] and "merge" in yaml.safe_load(front)["tags"]
    assert "1,311,872 parameters" in body and "| `sft-soup` | merge.soup |" in body and "1.9e-06" in body


def test_a_small_recipe_without_judge_export_and_corpus(tmp_path):
    inputs = recipe_records.whole(tmp_path / "store", domains=("code", "math"), judged=False)
    for score in inputs["scores"].values():
        found = json.loads((score.path / "scores.json").read_text())
        (score.path / "scores.json").write_text(json.dumps(found | {"perplexity": {}}))
    _, files = make({"scores": inputs["scores"]}, tmp_path / "out", hourly_cost=2.0)
    page = Page(files["report.html"])
    assert {"matrix", "gains", "retention", "time"} <= page.ids
    assert not {"wins", "length-1", "perplexity", "data"} & page.ids
    assert "USD" in files["report.html"]
    assert json.loads(files["matrix.json"])["win_rates"] == []


def test_a_single_model(tmp_path):
    inputs = recipe_records.whole(tmp_path / "store", domains=("math",))
    _, files = make({"scores": {"instruct": inputs["scores"]["instruct"]}}, tmp_path / "out")
    assert {"matrix", "lineage", "time"} <= Page(files["report.html"]).ids


def test_scores_on_other_prompts_are_refused(inputs, tmp_path):
    other = recipe_records.whole(tmp_path / "store")["scores"]["base"]
    found = json.loads((other.path / "scores.json").read_text())
    found["digests"]["prompts"]["math"] = "d" * 64
    (other.path / "scores.json").write_text(json.dumps(found))
    with pytest.raises(CuveeError, match="scores of base and pretrained differ in digests.prompts"):
        make({"scores": {"pretrained": inputs["scores"]["pretrained"], "base": other}}, tmp_path / "out")
    with pytest.raises(CuveeError, match="no scores to report"):
        make({"scores": {}}, tmp_path / "none")


def test_origin_prefers_the_weights_that_are_continued():
    link = {"fingerprint": "a", "kind": "checkpoint"}
    assert origin({"inputs": {"reward": {"fingerprint": "r", "kind": "reward_model"}, "init": link}}) == "a"
    soup = {"models": {"code": {"fingerprint": "c", "kind": "checkpoint"}}, "base": link}
    assert origin({"inputs": soup}) == "a"
    assert origin({"inputs": {"models": soup["models"]}}) == "c"
    assert origin({"inputs": {}}) is None
    given = {"start": link, **soup} | {"models": soup["models"] | {"math": {"fingerprint": "m", "kind": "checkpoint"}}}
    choice = {"stage": "evaluation.choose", "inputs": given, "metrics": {"win/code": 0.7, "chosen/code": 0.0}}
    assert origin(choice | {"metrics": {"chosen/code": 0.0, "chosen/math": 1.0}}) == "m"
    assert origin(choice | {"metrics": {"chosen/code": 0.0, "chosen/start": 1.0}}) == "a"
