import math
from pathlib import Path

import pytest

from llmopt.bench.workload import Workload
from llmopt.errors import InputError


def test_no_warm_up_is_measured():
    warmups, prompts = Workload(num_prompts=20, num_warmups=3, input_len=8, output_len=5).prompts()
    assert (len(warmups), len(prompts)) == (3, 20)
    assert not {prompt.content for prompt in warmups} & {prompt.content for prompt in prompts}
    assert all(prompt.max_tokens == 5 for prompt in prompts)


def test_custom_prompts_are_sent_as_they_are_after_other_warm_ups(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "one"}\n{"prompt": "two"}\n')
    workload = Workload(dataset_name="custom", dataset_path=file, num_prompts=2)
    warmups, prompts = workload.prompts()
    assert [prompt.content for prompt in prompts] == ["one", "two"]
    assert warmups[0].content not in ("one", "two")
    assert workload.describe()["input_len"] is None


def test_an_infinite_rate_is_null_in_the_report():
    assert Workload().describe()["request_rate"] is None
    assert (
        Workload(request_rate=2.0).describe() | {"request_rate": 2.0, "burstiness": 1.0}
        == Workload(request_rate=2.0, burstiness=1.0).describe()
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_prompts": 0}, "--num-prompts must be at least 1"),
        ({"num_warmups": 0}, "--num-warmups must be at least 1"),
        ({"max_concurrency": 0}, "--max-concurrency must be at least 1"),
        ({"input_len": 0}, "--input-len must be at least 1"),
        ({"num_gpus": -1}, "must not be negative"),
        ({"dataset_name": "sonnet"}, "known: random, custom"),
        ({"dataset_name": "custom"}, "needs --dataset-path"),
        ({"dataset_path": Path("x")}, "needs --dataset-name custom"),
        ({"dataset_name": "custom", "dataset_path": Path("x"), "input_len": 3}, "--dataset-name random"),
        ({"dataset_name": "custom", "dataset_path": Path("x"), "tokenizer": "smollm2"}, "--dataset-name random"),
        ({"burstiness": 2.0}, "finite --request-rate"),
        ({"burstiness": 2.0, "request_rate": math.inf}, "finite --request-rate"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        Workload(**settings)
