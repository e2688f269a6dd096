"""`AlphaEditor.check` says what it sees, and changes nothing."""

import json

import pytest
import torch
from tiny import tiny_model, tiny_tokenizer

from hf_alphaedit import AlphaEditConfig, AlphaEditor


@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("llama", "as it is: the published rule"),
        ("granite", "times 0.25"),
        ("gemma2", "each of the 2 layers has targets of its own"),
    ],
)
def test_the_report_names_weights_rule_and_cost(family: str, words: str) -> None:
    model = tiny_model(family)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = AlphaEditor(model, tiny_tokenizer(), AlphaEditConfig(layers=(1, 2))).check()
    text = str(report)
    assert words in text
    assert "model.layers.1.mlp.down_proj (32 x 64, float32, cpu)" in text
    assert "statistics: 640 tokens" in text
    assert [site.site for site in report.sites] == [f"model.layers.{layer}.mlp.down_proj" for layer in (1, 2)]
    assert 0 < report.edit_seconds < 3600
    assert report.edit_bytes > 0
    assert json.loads(json.dumps(report.to_dict()))["blocks"] == 5
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
