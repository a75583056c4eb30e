from __future__ import annotations

import json

import av
import numpy as np
import pytest

from benchmarks import video


@pytest.fixture
def clip(tmp_path):
    """Twelve frames of a square that moves, as MP4."""
    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=6)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(12):
            picture = np.zeros((48, 64, 3), np.uint8)
            picture[10:30, 4 * number : 4 * number + 16] = 255
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


def test_every_method_that_can_act_on_frames_is_timed(clip, tmp_path, capsys):
    arguments = ["--clip", str(clip), "--tiny", "--frames", "5", "--keep", "0.5", "--cache", str(tmp_path)]
    assert video.main([*arguments, "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "video.json").read_text())["rows"]
    assert [row["method"] for row in rows] == list(video.methods())
    assert {"random", "uniform", "holitom", "fastvid", "dycoke", "flexselect"} <= {row["method"] for row in rows}
    # Two by two tokens a frame, one learned token behind the last frame.
    assert {row["kept"] for row in rows} == {5 * 4 // 2 + 1}
    assert all(row["cost_ms"] > 0 for row in rows)
    assert "| holitom | AGN |" in (tmp_path / "video.md").read_text()
    assert "written to" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--methods", "nope"], ["--clip", "nowhere.mp4"], ["--keep", "1.0"]])
def test_arguments_that_make_no_sense_are_refused(arguments, clip, capsys):
    with pytest.raises(SystemExit):
        video.main(["--clip", str(clip), *arguments])
    assert "error" in capsys.readouterr().err
