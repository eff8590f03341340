"""neupims/machine/traces.py: files of requests in all their forms, distributions, and packings."""

import json

import numpy as np
import pytest

import neupims
from neupims.__main__ import main
from neupims.machine.traces import place_requests, read_requests
from neupims.machine.workload import halves
from neupims.scheduling.objective import make_problem
from neupims.scheduling.packing import PACKINGS

IN_OUT = "input,output\n100,40\n7,1\n2048,10\n"
AZURE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    "2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,109\n"
)
MOONCAKE = (
    '{"timestamp": 0, "input_length": 374, "output_length": 44, "hash_ids": [0, 1]}\n'
    '{"timestamp": 3000, "input_length": 396, "output_length": 109, "hash_ids": []}\n'
)


def written(folder, content, name="trace.csv"):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    ("content", "lengths", "channels"),
    [
        ("300\n40\n513\n", [300, 40, 513], None),
        ("seq_len\n300\n40\n513\n", [300, 40, 513], None),
        ("tokens\n300\n40\n513\n", [300, 40, 513], None),
        ("input_length\n300\n40\n513\n", [300, 40, 513], None),
        ("seq_len,ch_idx\n300,0\n40,1\n513,0\n", [300, 40, 513], [0, 1, 0]),
        ("ch_idx,note,seq_len\n0,a,300\n1,,40\n0,c,513\n", [300, 40, 513], [0, 1, 0]),
        ("id;Seq Len\n1;300\n2;40\n3;513\n", [300, 40, 513], None),
        ("id\tseq-len\n1\t300\n2\t40\n3\t513\n", [300, 40, 513], None),
        ("\ufeffseq_len\r\n300\r\n\r\n 40 \r\n513.0", [300, 40, 513], None),
        ("\ufeff300\n40\n513\n", [300, 40, 513], None),
        ("seq_len\r300\r40\r513\r", [300, 40, 513], None),
        ('"seq_len","ch_idx"\n"300","0"\n"40","1"\n"513","0"\n', [300, 40, 513], [0, 1, 0]),
        ("[300, 40, 513]", [300, 40, 513], None),
        ('[{"seq_len": 300}, {"seq_len": 40}, {"seq_len": 513.0}]', [300, 40, 513], None),
        ('{"seq_len": 300}\n\n{"seq_len": 40}\n{"seq_len": 513}', [300, 40, 513], None),
    ],
)
def test_lengths_in_every_form(tmp_path, content, lengths, channels):
    found = read_requests(written(tmp_path, content))
    assert (found.name, found.seq_lens.tolist(), found.notes) == ("trace", lengths, ())
    assert (found.channels if channels is None else found.channels.tolist()) == channels


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (AZURE, "trace.csv"),
        (MOONCAKE, "trace.jsonl"),
        (MOONCAKE, "trace"),
        ("timestamp,input_length,output_length,hash_ids\n0,374,44,\n1,396,109,\n", "trace.csv"),
        ("arrival_s,input_tokens,output_tokens\n0.0,374,44\n0.5,396,109\n", "trace.csv"),
        (
            "Timestamp,Model,Request tokens,Response tokens,Total tokens\n"
            "5,G,374,44,418\n45,G,396,109,505\n",
            "t",
        ),
        ("prompt_len,response_len\n374,44\n396,109\n", "trace.csv"),
    ],
)
def test_input_and_output_in_every_form(tmp_path, content, name):
    path = written(tmp_path, content, name)
    assert read_requests(path, generated=0).seq_lens.tolist() == [374, 396]
    assert read_requests(path, generated=0.5).seq_lens.tolist() == [374 + 22, 396 + 54]
    assert read_requests(path, generated=1).seq_lens.tolist() == [374 + 44, 396 + 109]
    found = read_requests(path)
    assert (found.seq_lens >= [374, 396]).all()
    assert (found.seq_lens < [374 + 44, 396 + 109]).all()
    assert "random point of its output (seed 0)" in found.notes[0]


def test_a_request_is_at_any_point_of_its_output(tmp_path):
    """1,000 requests of 0 + 10 tokens are at 0 to 9 tokens about equally often; 0 counts as 1."""
    path = written(tmp_path, "input,output\n" + "0,10\n" * 1000)
    found = np.bincount(read_requests(path).seq_lens)
    assert len(found) == 10
    assert 150 < found[1] < 250
    assert (found[2:] > 60).all()
    one, two, again = (read_requests(path, seed=seed).seq_lens.tolist() for seed in (1, 2, 1))
    assert one == again != two


def test_requests_without_output_are_left_out_and_counted(tmp_path):
    found = read_requests(written(tmp_path, "input,output\n5,0\n9,1\n5,0\n"))
    assert found.seq_lens.tolist() == [9]
    assert found.notes[0] == "2 requests without output are left out"
    with pytest.raises(ValueError, match="holds no request"):
        read_requests(written(tmp_path, "input,output\n5,0\n"))


def test_drawn_requests_keep_the_order_of_the_trace(tmp_path):
    path = written(tmp_path, "\n".join(map(str, range(1, 101))))
    found = read_requests(path, draw=20, seed=3)
    assert len(set(found.seq_lens.tolist())) == 20
    assert sorted(found.seq_lens) == found.seq_lens.tolist()
    assert found.notes == ("20 of the 100 requests, drawn with seed 3",)
    assert read_requests(path, draw=100).seq_lens.tolist() == list(range(1, 101))
    for count in (0, 101):
        with pytest.raises(ValueError, match=f"from 1 to 100, not {count}"):
            read_requests(path, draw=count)


@pytest.mark.parametrize(
    ("content", "columns", "words"),
    [
        ("", None, "is empty; a trace has the columns seq_len"),
        (" \n\n", None, "is empty"),
        ("seq_len\n", None, "holds no request"),
        ("input,output\n", None, "holds no request"),
        ("[]", None, "holds no request"),
        ("300,0\n40,1\n", None, "not clear which hold the lengths"),
        ("a,b\n300,0\n", None, "the columns 'a,b': it is not clear"),
        ("output\n5\n", None, "not clear"),
        ("input_tokens,prompt_tokens,output\n1,1,1\n", None, "input_tokens or prompt_tokens"),
        ("seq_len,input,output\n1,1,1\n", None, "not clear"),
        ("input,ch_idx\n1,1\n", None, "not clear"),
        ("seq_len\n-5\n", None, "line 2: the length must be from 1 to 1000000, not -5"),
        ("seq_len\n5\n0\n", None, "line 3: the length must be from 1"),
        ("seq_len\n1000001\n", None, "not 1000001"),
        ("input,output\n900000,900000\n5,5\n", None, "more than 1000000"),
        ("seq_len\n" + "9" * 400, None, "line 2"),
        ("seq_len\n30.5\n", None, "line 2: the length must be a whole number, not '30.5'"),
        ("seq_len\nnan\n", None, "not 'nan'"),
        ("seq_len\n1e3\n", None, "not '1e3'"),
        ("seq_len\n1_000\n", None, "not '1_000'"),
        ("seq_len\n\u0663\n", None, "line 2"),
        ('seq_len\n"2,048"\n', None, "not '2,048'"),
        ("seq_len,ch_idx\n300\n", None, "line 2: the channel must be a whole number, not nothing"),
        ("seq_len,ch_idx\n300,\n", None, "line 2: the channel must be a whole number, not nothing"),
        ("seq_len,ch_idx\n300,1.5\n", None, "line 2"),
        ("seq_len\n3\x0000\n", None, "trace.csv"),
        (b"\x89PNG\r\n\x1a\n\x00\xff", None, "not a CSV file"),
        ("seq_len\n300\n".encode("utf-16"), None, "save it as UTF-8"),
        ("seq_len\n300\nl\u00e4nge\n".encode("latin-1"), None, "save it as UTF-8"),
        ('{"input_length": 5}\n{"input_length"\n', None, "not JSON with one request a line"),
        ('{"input": 5, "output": 4}\n{"input": 5}\n', None, "line 2: the output"),
        ('{"input": 5, "output": true}\n', None, "not 'true'"),
        ('{"input": 5, "output": NaN}\n', None, "not 'NaN'"),
        ('{"seq_len": [5]}\n', None, "line 1"),
        ("[[300, 1]]", None, "one object, or one length"),
        ("a,b\n300,0\n", {"size": "a"}, "a column is length, channel, input or output, not size"),
        ("a,b\n300,0\n", {"length": "c"}, "has no column 'c'; it has a, b"),
        ("a,b\n300,0\n", {"length": "3"}, "has no column '3'"),
        ("a,b\n300,0\n", {"input": "a"}, "not clear"),
    ],
)
def test_wrong_files_are_refused_in_a_sentence(tmp_path, content, columns, words):
    with pytest.raises(ValueError) as refused:  # noqa: PT011
        read_requests(written(tmp_path, content), columns=columns)
    assert words in str(refused.value)
    assert len(str(refused.value)) < 600


def test_columns_by_name_and_by_number(tmp_path):
    path = written(tmp_path, "prompt a,prompt b,seq_len\n1,2,3\n4,5,6\n")
    for columns, lengths in (
        ({"length": "prompt b"}, [2, 5]),
        ({"length": "1"}, [1, 4]),
        ({"input": "1", "output": "seq_len"}, [4, 10]),
    ):
        assert read_requests(path, columns=columns, generated=1).seq_lens.tolist() == lengths
    path = written(tmp_path, "300,0\n40,1\n")
    found = read_requests(path, columns={"length": "1", "channel": "2"})
    assert (found.seq_lens.tolist(), found.channels.tolist()) == ([300, 40], [0, 1])


@pytest.mark.parametrize(
    "options", [{"generated": -0.1}, {"generated": 1.5}, {"generated": "half"}, {"seed": -1}]
)
def test_wrong_options_are_refused(options):
    with pytest.raises(ValueError, match="0"):
        read_requests("const:5x5", **options)


@pytest.mark.parametrize(
    ("name", "inputs", "outputs"),
    [("sharegpt", (80.3, 17), (295, 261)), ("alpaca", (12.1, 11), (55.8, 40))],
)
def test_data_sets_have_their_means_and_medians(name, inputs, outputs):
    """Over 100,000 requests. ShareGPT's inputs lose a fifth of their mean at 2,048 tokens."""
    prompts = read_requests(f"{name}:100000", generated=0).seq_lens
    ends = read_requests(f"{name}:100000", generated=1).seq_lens
    assert ends.max() <= 2048
    assert prompts.min() >= 1
    answers = ends - prompts
    assert np.median(prompts) == pytest.approx(inputs[1], abs=1)
    assert np.median(answers) == pytest.approx(outputs[1], rel=0.03)
    assert prompts.mean() == pytest.approx(inputs[0], rel=0.2 if name == "sharegpt" else 0.05)
    assert answers.mean() == pytest.approx(outputs[0], rel=0.05)


def test_other_distributions():
    assert read_requests("const:2048x128").seq_lens.tolist() == [2048] * 128
    assert read_requests("Const:1x1").seq_lens.tolist() == [1]
    lengths = read_requests("uniform:5-8x4000", seed=1).seq_lens
    assert (np.bincount(lengths)[5:] > 900).all()
    assert len(np.bincount(lengths)) == 9
    assert np.array_equal(lengths, read_requests("uniform:5-8x4000", seed=1).seq_lens)


@pytest.mark.parametrize(
    "text",
    [
        *("sharegtp:256", "sharegpt:", "sharegpt:0", "sharegpt:-5", "sharegpt:1.5", "sharegpt:x"),
        *("const:2048", "const:0x5", "const:5x0", "const:2048x128x2", "const:9999999x5"),
        *("uniform:9-5x4", "uniform:5x4", "uniform:0-5x4", "alpaca:99999999999999999999999999"),
    ],
)
def test_wrong_distributions_are_refused(text):
    with pytest.raises(ValueError, match=r"there is no distribution|must"):
        read_requests(text)
    with pytest.raises(ValueError, match="has no columns"):
        read_requests("const:5x5", columns={"length": "a"})


def test_a_path_with_a_colon_is_a_file(tmp_path):
    path = written(tmp_path, "300\n", "const:5x5")
    assert read_requests(path).seq_lens.tolist() == [300]


LENGTHS = np.random.default_rng(0).integers(1, 900, 48)


@pytest.mark.parametrize(
    ("name", "baseline"),
    [
        ("greedy", "greedy (paper), halves"),
        ("longest-first", "longest first, snake"),
        ("round-robin", "round robin, halves"),
    ],
)
def test_packings_are_the_baselines_of_the_search(tmp_path, name, baseline):
    from neupims.scheduling.baselines import baselines
    from neupims.scheduling.decision import Choices

    path = written(tmp_path, "\n".join(map(str, LENGTHS)))
    changes = {"hbm.num_channels": 8}
    case = neupims.make_case("gpt3-7b", path, packing=PACKINGS[name], changes=changes)
    assert case.batch.seq_lens.tolist() == LENGTHS.tolist()
    assert case.trace_notes == (f"the requests are dealt to 8 channels: {name.replace('-', ' ')}",)
    problem = make_problem(case.hardware, case.model, case.parallel, LENGTHS)
    genome = baselines(Choices(8), problem)[baseline]
    assert np.array_equal(case.batch.channels, genome.places // 2)
    assert np.array_equal(case.batch.sub_batches, genome.places % 2)


def test_channels_that_the_machine_lacks_are_refused_with_the_way(tmp_path):
    path = written(tmp_path, "seq_len,ch_idx\n300,0\n40,16\n")
    changes = {"hbm.num_channels": 16}
    with pytest.raises(
        ValueError, match=r"request 1 must be from 0 to 15, not 16.*16 channels.*--packing greedy"
    ):
        neupims.make_case("gpt3-7b", path, changes=changes)
    case = neupims.make_case("gpt3-7b", path, changes=changes, packing=PACKINGS["round-robin"])
    assert case.batch.channels.tolist() == [0, 1]
    with pytest.raises(ValueError, match=r"x3 has no channels.*--packing greedy"):
        neupims.make_case("gpt3-7b", "const:2048x3")
    batch = place_requests(read_requests(path), 32)
    assert np.array_equal(batch.sub_batches, halves(batch.channels, 32))


def printed(capsys, *flags):
    assert main(["simulate", "--model", "gpt3-7b", "--path", "closed", "--json", *flags]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_tool_deals_lengths(capsys, tmp_path):
    path = str(written(tmp_path, IN_OUT))
    found = printed(capsys, "--trace", path, "--generated", "0.5")
    case = neupims.make_case(
        "gpt3-7b", read_requests(path, generated=0.5), packing=PACKINGS["greedy"]
    )
    assert found == neupims.simulate_case(case, path="closed").to_dict()
    assert found["trace_notes"] == [
        "each request has generated 0.5 of its output",
        "the requests are dealt to 32 channels: greedy",
    ]
    other = printed(capsys, "--trace", path, "--packing", "round-robin", "--trace-seed", "5")
    assert "seed 5" in other["trace_notes"][0]
    assert "round robin" in other["trace_notes"][1]
    assert printed(capsys, "--trace", "const:2048x64")["batch"] == 64
    drawn = printed(capsys, "--trace", path, "--requests", "2", "--columns", "length=input")
    assert drawn["batch"] == 2


def test_a_prefill_reads_the_input_alone(capsys, tmp_path):
    path = str(written(tmp_path, "input,output\n100,4000\n"))
    flags = ["--trace", path, "--packing", "greedy"]
    assert main(["simulate", "--model", "gpt3-7b", "--prefill", "--json", *flags]) == 0
    found = json.loads(capsys.readouterr().out)
    batch = neupims.make_batch([100], [0])
    alone = neupims.simulate_case(neupims.make_case("gpt3-7b", batch), prefill=True).to_dict()
    assert found["first_token_seconds"] == alone["first_token_seconds"]
    assert found["trace_notes"][0] == "each request has generated 0 of its output"


def test_the_tool_prints_what_was_assumed(capsys):
    assert main(["simulate", "--model", "gpt3-7b", "--trace", "alpaca:64"]) == 0
    said = capsys.readouterr().err
    assert all(line.startswith("neupims: note: alpaca:64: ") for line in said.splitlines())
    for words in ("log-normal", "random point of its output (seed 0)", "32 channels: greedy"):
        assert words in said


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--trace", "sharegtp:256"], "there are sharegpt:256, alpaca:256"),
        (["--trace", "const:5x5", "--generated", "half"], "--generated is a share from 0 to 1"),
        (["--trace", "const:5x5", "--columns", "length"], "--columns is ROLE=NAME"),
        (["--trace", "const:5x5", "--trace-seed", "-1"], "seed must be at least 0"),
        (["--trace", "const:5x5", "--requests", "9"], "from 1 to 5, not 9"),
    ],
)
def test_the_tool_refuses_in_one_line(capsys, flags, words):
    assert main(["simulate", "--model", "gpt3-7b", *flags]) == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert words in err
