"""set_dropout on configs and built models of many kinds."""

import pytest
import torch
import transformers

from hf_recipe.regularize.dropout import set_dropout, set_stochastic_depth

FIELDS = {
    "BertConfig": {"hidden_dropout_prob", "attention_probs_dropout_prob"},
    "GPT2Config": {"resid_pdrop", "embd_pdrop", "attn_pdrop", "summary_first_dropout"},
    "LlamaConfig": {"attention_dropout"},
    "T5Config": {"dropout_rate", "classifier_dropout"},
    "ViTConfig": {"hidden_dropout_prob", "attention_probs_dropout_prob"},
    "BartConfig": {"dropout", "attention_dropout", "activation_dropout", "classifier_dropout"},
    "CLIPConfig": {"text_config.attention_dropout", "vision_config.attention_dropout"},
    "SwinConfig": {"hidden_dropout_prob", "attention_probs_dropout_prob"},
    "EfficientNetConfig": {"dropout_rate"},
    "ResNetConfig": set(),
}


@pytest.mark.parametrize("name", FIELDS)
def test_the_fields_of_a_config(name):
    config = getattr(transformers, name)()
    changed = set_dropout(config, 0.37)
    assert set(changed.config) == FIELDS[name]
    for path in changed.config:
        holder = config
        for part in path.split("."):
            holder = getattr(holder, part)
        assert holder == 0.37
    assert bool(changed) == bool(FIELDS[name])


def test_whole_layers_are_another_matter():
    config = transformers.SwinConfig()
    set_dropout(config, 0.3)
    assert config.drop_path_rate == 0.1
    assert set(set_stochastic_depth(config, 0.2).config) == {"drop_path_rate"}
    assert config.drop_path_rate == 0.2
    assert config.hidden_dropout_prob == 0.3


def built():
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return {
        "bert": transformers.BertForSequenceClassification(
            transformers.BertConfig(vocab_size=20, intermediate_size=16, **small)
        ),
        "gpt2": transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=20, n_embd=16, n_layer=2, n_head=2)
        ),
        "llama": transformers.LlamaForCausalLM(
            transformers.LlamaConfig(vocab_size=20, intermediate_size=16, **small)
        ),
    }


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_a_built_model_drops_and_stops_dropping(name):
    model = built()[name].train()
    ids = torch.arange(2, 18)[None]

    def varies():
        torch.manual_seed(0)
        first = model(input_ids=ids).logits
        return not torch.equal(first, model(input_ids=ids).logits)

    changed = set_dropout(model, 0.5)
    assert changed
    assert varies()
    set_dropout(model, 0.0)
    assert not varies()
    assert set_dropout(model, 0.2).modules, "what was set to 0 is found again"


def test_where_there_is_none_it_says_so(caplog):
    changed = set_dropout(torch.nn.Linear(2, 2), 0.1)
    assert not changed
    assert "neither" in str(changed)
    assert "nothing was set" in caplog.text
    lone = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout(0.5))
    assert set_dropout(lone, 0.1).modules == {"1": 0.5}
    assert lone[1].p == 0.1
    assert "1 modules" in str(set_dropout(lone, 0.2))
    assert not set_dropout(torch.nn.LSTM(2, 2, num_layers=1), 0.1)
    assert set_dropout(torch.nn.LSTM(2, 2, num_layers=2), 0.1).modules == {"dropout": 0.0}


@pytest.mark.parametrize("rate", [1.0, -0.1, "0.1", True, float("nan")])
def test_a_rate_that_cannot_be(rate):
    with pytest.raises(ValueError, match="dropout rate"):
        set_dropout(transformers.BertConfig(), rate)


def test_what_is_neither_config_nor_module():
    with pytest.raises(TypeError, match="needs a config or a module"):
        set_dropout({"dropout": 0.1}, 0.2)
