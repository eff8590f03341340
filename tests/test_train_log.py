"""train/log.py: the lines of metrics.jsonl, also damaged ones."""

import pytest

from train.cli import Refused
from train.log import Log, drop_lines_after, read_metrics


def test_lines_after_the_checkpoint_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for torn in (
        '{"kind": "eval", "ste',
        '{"kind": "eval", "step": 2, "p": {"pool/p": [1.0]}',
        "\\udce2",
    ):
        path.write_text('{"kind": "train", "step": 1}\n{"kind": "train", "step": 3}\n' + torn)
        drop_lines_after(path, 2)
        assert path.read_text() == '{"kind": "train", "step": 1}\n'


def test_the_log_writes_json_lines_and_speaks(tmp_path, capsys):
    log = Log(tmp_path, total_steps=3, start=0)
    log.banner({"model": "small"})
    log.metrics("train", 1, {"loss": 0.5}, "step 1")
    log.close()
    assert read_metrics(tmp_path, "train") == [{"kind": "train", "step": 1, "loss": 0.5}]
    assert capsys.readouterr().err == "model  small\nstep 1\n"


def test_a_cut_last_line_is_left_out_and_other_damage_is_one_sentence(tmp_path):
    path, whole = tmp_path / "metrics.jsonl", '{"kind": "train", "step": 1}\n'
    for cut in ('{"kind": "tra', '{"kind": "train", "step": 2', "3", "\udce2"):
        path.write_bytes((whole + cut).encode(errors="surrogateescape"))
        assert read_metrics(tmp_path, "train") == [{"kind": "train", "step": 1}]
    path.write_text(whole + whole.strip())  # complete, without its end
    assert len(read_metrics(tmp_path, "train")) == 2
    for damaged, number in (('{"kind"\n' + whole, 1), (whole + "3\n", 2), (whole + "{}\n", 2)):
        path.write_text(damaged)
        with pytest.raises(Refused, match=rf"line {number} of .*metrics.jsonl is damaged: delete"):
            read_metrics(tmp_path, "train")
