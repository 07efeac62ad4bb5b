"""The plans of families: names as transformers writes them, and no row without a layer."""

from types import SimpleNamespace

import pytest
import torch

from coati.parallel.families import splits_of
from coati.parallel.policy.plan import COUNTS, PP_PLANS, TP_PLANS, Styles, pp_plan, tp_plan
from coati.utils.transformers_compat import body_name
from tests.models_table.families import BY_TYPE, known, tiny_config

HERE = [name for name in TP_PLANS if known(BY_TYPE[name])]


def body(name):
    """The base model of a family's tiny model, without weights."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config(BY_TYPE[name]))
    return getattr(model, body_name(model))


def test_a_star_stands_for_an_index_alone():
    styles = Styles({"layers.*.mlp.up_proj": "colwise", "embed": "embedding_rowwise"})
    assert styles.of("layers.11.mlp.up_proj") == "colwise" and styles.of("embed")
    for name in ("layers.a.mlp.up_proj", "layers.1.2.mlp.up_proj", "layers.1.mlp.up_proj.weight"):
        assert styles.of(name) is None


@pytest.mark.parametrize("name", HERE)
def test_every_row_of_our_plans_names_a_layer(name):
    model = body(name)
    names = [n for n, _ in model.named_modules()] + [n for n, _ in model.named_parameters()]
    for row, style in TP_PLANS[name].items():
        assert any(Styles({row: style}).of(each) for each in names), row
    for row, attributes in COUNTS.get(name, {}).items():
        owners = [m for n, m in model.named_modules() if Styles({row: "x"}).of(n)]
        assert owners and all(hasattr(m, a) for m in owners for a in attributes), row


@pytest.mark.parametrize("name", [n for n in PP_PLANS if known(BY_TYPE[n])])
def test_pipeline_plans_name_children_in_the_order_in_which_they_run(name):
    model = body(name)
    owner = getattr(model, "decoder", model)
    children = [n for n, _ in owner.named_children()]
    assert [n for n in PP_PLANS[name] if n not in children] == []
    modules = [getattr(owner, n) for n in PP_PLANS[name]]
    assert sum(isinstance(m, torch.nn.ModuleList) for m in modules) == 1


def test_a_composite_configuration_is_asked_for_its_text():
    text = SimpleNamespace(model_type="x", base_model_tp_plan={"a": "colwise"})
    whole = SimpleNamespace(model_type="y", get_text_config=lambda: text)
    assert tp_plan(whole) == {"a": "colwise"} and pp_plan(whole) == ()


def test_without_a_plan_nothing_is_split():
    assert splits_of(SimpleNamespace(model_type="xlstm")) is None
