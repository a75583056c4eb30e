from __future__ import annotations

import json

import pytest
from safetensors import safe_open

from benchmarks import video_quality
from benchmarks.demo_accuracy import Question, Score
from benchmarks.video_quality_report import Family, VideoRow, markdown
from prismserve.models.reference.clip_model import load, save_trained, write_checkpoint
from prismserve.models.reference.clip_questions import CLIP_FAMILIES
from prismserve.models.reference.clips import HELD_OUT_SEED


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """The bundled decoder as if it had been trained for clips."""
    folder = tmp_path_factory.mktemp("clips")
    model, _ = load(write_checkpoint(folder))
    save_trained(model, folder / "decoder.safetensors")
    return folder / "decoder.safetensors"


def test_every_video_method_and_control_is_measured():
    listed = video_quality.methods()
    assert set(listed[:3]) == {"random", "uniform", "pool"}
    assert listed[3] == "oracle"
    assert {
        *("holitom", "dycoke", "fastvid", "chatunivi", "longvu", "dynamicvlm", "llamavid", "vqtoken", "flexselect"),
        *("divprune", "dpp", "salience", "cdpruner", "prefill/framefusion", "prefill/sttm", "prefill/holitom_inner"),
    } <= set(listed)
    assert video_quality.video_plan("cdpruner", 24)[2] == "QRY"


def test_questions_are_of_held_out_clips_and_as_many_as_asked_for():
    drawn = video_quality.draw_questions(2, HELD_OUT_SEED)
    assert {name: sum(q.family == name for q in drawn) for name in CLIP_FAMILIES} == dict.fromkeys(CLIP_FAMILIES, 2)
    assert min(question.seed for question in drawn) >= HELD_OUT_SEED


def test_a_family_counts_only_where_the_model_beats_the_most_common_answer():
    questions = [Question(1, "count", "?", "2")] * 8 + [Question(1, "count", "?", "3")] * 2
    low = VideoRow("off", 196, "AGN", {"count": Score(8, 10)}, 196.0, 0.0)
    high = VideoRow("off", 196, "AGN", {"count": Score(980, 1000)}, 196.0, 0.0)
    assert [one.used for one in video_quality.judged(questions, low, 0.5)] == [False]
    assert [one.used for one in video_quality.judged(questions, high, 0.5)] == [True]


def test_the_page_says_which_rows_are_apart_from_random():
    def row(method, right):
        return VideoRow(method, 24, "AGN", {"when": Score(right, 400)}, 24.0, 0.0)

    page = markdown(
        [row("random", 200), row("better", 300), row("alike", 205), row("worse", 90)],
        [Family("when", Score(390, 400), 0.5, True), Family("count", Score(9, 400), 0.5, False)],
        "conditions",
    )
    lines = {line.split(" | ")[1]: line for line in page.splitlines() if line.startswith("| 24 |")}
    assert "| +25.0 * |" in lines["better"]
    assert "| +1.2 |" in lines["alike"]
    assert "| -27.5 * |" in lines["worse"]
    assert "| count | 2.2 (1 to 4) | 50.0 | no |" in page


@pytest.mark.slow
def test_it_measures_asks_and_writes(weights, tmp_path, capsys):
    arguments = ["--per-family", "2", "--keeps", "49", "--least", "0", "--weights", str(weights)]
    assert (
        video_quality.main(
            [*arguments, "--methods", "random,oracle,holitom,flexselect,prefill/sttm", "--out", str(tmp_path)]
        )
        == 0
    )
    document = json.loads((tmp_path / "video_quality.json").read_text())
    assert set(document["families"]) == set(CLIP_FAMILIES)
    rows = document["rows"]
    assert all(family["used"] for family in document["families"].values())
    assert [row["method"] for row in rows] == ["off", "random", "oracle", "holitom", "flexselect", "prefill/sttm"]
    assert all(row["total"]["asked"] == 2 * len(CLIP_FAMILIES) for row in rows)
    assert {row["tokens"] for row in rows if row["method"] in {"random", "oracle", "flexselect"}} == {49.0}
    assert "most common answer" in (tmp_path / "video_quality.md").read_text()
    assert "written to" in capsys.readouterr().out
    arguments += ["--out", str(tmp_path), "--resume"]
    assert video_quality.main([*arguments, "--methods", "random,dpp,holitom"]) == 0
    assert [line.split()[3] for line in capsys.readouterr().out.splitlines()[:-1]] == ["dpp"]
    resumed = json.loads((tmp_path / "video_quality.json").read_text())
    assert resumed["rows"][:-1] == rows
    assert {key: resumed[key] for key in ("conditions", "basis", "families")} == {
        key: document[key] for key in ("conditions", "basis", "families")
    }
    with pytest.raises(SystemExit):
        video_quality.main([*arguments, "--seed", str(HELD_OUT_SEED + 1)])
    assert "other questions or weights" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["--methods", "nope"], ["--keeps", "0"], ["--per-family", "0"], ["--weights", "nowhere"]]
)
def test_arguments_that_make_no_sense_are_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        video_quality.main(arguments)
    assert "error" in capsys.readouterr().err


def test_the_stored_weights_are_the_decoder_and_nothing_else():
    assert video_quality.WEIGHTS.stat().st_size < 8_000_000
    with safe_open(video_quality.WEIGHTS, "pt") as weights:
        names = list(weights.keys())
    assert names
    assert all(name.startswith("model.language_model.") for name in names)


def test_methods_that_compute_something_for_every_question_are_measured_last():
    pairs = video_quality.dear_last(("flexselect", "random", "prefill/sttm"), (98, 24))
    assert pairs[:2] == [("random", 98), ("random", 24)]
    assert set(pairs[2:]) == {(name, keep) for name in ("flexselect", "prefill/sttm") for keep in (98, 24)}
