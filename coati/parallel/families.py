"""What of each model family can be split. Imports neither torch nor ColossalAI.

Under transformers 5 one policy (policy/) splits every family by its plan; under transformers 4
ColossalAI 0.5.0's own policies do, and :data:`SPLITS` says of which families.

A family is ``config.model_type``. Every "can" and every refusal here is a cell of docs/models.md,
which a test writes from what tiny models did.
"""

from typing import Any

from coati.models.attention_choice import caps_scores, eager_note
from coati.parallel.plugins import PLUGINS, ParallelOptions
from coati.parallel.policy.plan import pp_plan, tp_plan
from coati.utils.transformers_compat import text_config, transformers_major

TP = "--tp"
PP = "--pp"
SPLIT_GATHER = "split_gather"
RING = "ring"
ALL_TO_ALL = "all_to_all"
_ALL = frozenset({TP, PP, SPLIT_GATHER, RING, ALL_TO_ALL})
_TP_PP = frozenset({TP, PP})

# transformers 4: families that plugin 3d takes, and what of it works. Any other family lacks a
# ColossalAI policy.
SPLITS: dict[str, frozenset[str]] = {
    "llama": _ALL,
    "mistral": _ALL,
    "qwen2": _ALL,
    "mixtral": _TP_PP,
    "gpt2": _TP_PP,
    "gptj": _TP_PP,
    "opt": _TP_PP,
    "bloom": _TP_PP,
    "falcon": _TP_PP,
    "chatglm": frozenset({PP}),
}

_WRONG = "ColossalAI 0.5.0 trains it with wrong gradients there"
_REASONS = {
    ("gpt2", SPLIT_GATHER): _WRONG,
    ("gpt2", RING): _WRONG,
    ("bloom", SPLIT_GATHER): _WRONG,
    ("bloom", RING): _WRONG,
    ("falcon", SPLIT_GATHER): "ColossalAI 0.5.0 ignores it there",
    ("falcon", RING): "ColossalAI 0.5.0 ignores it there",
    ("falcon", ALL_TO_ALL): "ColossalAI 0.5.0 ignores it there",
    ("opt", SPLIT_GATHER): "ColossalAI 0.5.0 ignores it there",
    ("opt", RING): "ColossalAI 0.5.0 ignores it there",
    ("opt", ALL_TO_ALL): "ColossalAI 0.5.0 ignores it there",
    (
        "chatglm",
        TP,
    ): "ColossalAI 0.5.0 cuts its joint query, key and value weights in the wrong place",
}

# Packs need a mask and positions of their own; there ColossalAI 0.5.0 makes others from the
# padding, or takes none.
_PACKS_PP = "--packing with --pp"
_PACKS_GEMINI_TP = "--packing with --plugin gemini --tp"
_NO_PACKS = {
    "mixtral": frozenset({_PACKS_PP}),
    "opt": frozenset({_PACKS_PP, _PACKS_GEMINI_TP}),
    "falcon": frozenset({_PACKS_PP, _PACKS_GEMINI_TP}),
}

# transformers 5: what the one policy or a plugin cannot do with a family, and why.
GEMINI = "gemini"
PACKING = "--packing"
LORA_TP = "--tp with LoRA"
_OWN_ATTENTION = "its attention is code of its own, in which heads cannot be exchanged for tokens"
_STATES = "layers that keep a state of all tokens before would see a part of the tokens"
_ALTUP = "its layers pass on several states for each token (AltUp)"
_SHARED = "its layers use the keys and values of others, which may be on another stage"
_OWN_LINEAR = "its layers hold their linear layers themselves, without a block to gather tokens for"
_CHOSEN = "its layers hand on the tokens that an indexer chose"
_STREAMS = "its layers pass on several streams of states (hyper-connections)"
_INDEXED = "its indexers would choose among a part of the tokens"
_EXPERTS = "Gemini does not see the gradients of its experts (zero/gemini/gemini_ddp.py:335)"
STATE_LAYERS = frozenset({"linear_attention", "conv", "mamba", "hybrid"})
CANNOT: dict[str, dict[str, str]] = {
    **{
        name: {ALL_TO_ALL: _STATES}
        for name in ("falcon_h1", "bamba", "nemotron_h", "granitemoehybrid", "lfm2", "lfm2_moe")
    },
    **{name: {ALL_TO_ALL: _OWN_ATTENTION} for name in ("gptj", "bloom", "falcon")},
    "doge": {TP: "its mask is made from the values of all heads (dt_proj, A)"},
    "nanochat": {PP: "its model normalizes what comes before the layers, on every stage anew"},
    "opt": {SPLIT_GATHER: _OWN_LINEAR, RING: _OWN_LINEAR},
    "gemma3n_text": {
        **dict.fromkeys((PP, SPLIT_GATHER, RING, ALL_TO_ALL), _ALTUP),
        PACKING: "the padding of a pack turns into NaN in its layers",
        LORA_TP: "some of its adapters take no part in the loss",
    },
    "gpt_oss": {GEMINI: _EXPERTS},
    "deepseek_v32": {ALL_TO_ALL: _INDEXED},
    "glm_moe_dsa": {ALL_TO_ALL: _INDEXED, PP: _CHOSEN},
    "deepseek_v4": {
        GEMINI: _EXPERTS,
        PACKING: "its compressed entries would hold tokens of two rows",
        **dict.fromkeys((PP, SPLIT_GATHER, RING, ALL_TO_ALL), _STREAMS),
    },
    "llama4_text": {
        GEMINI: _EXPERTS,
        PACKING: "its chunks would be counted from the beginning of the pack, not of each row",
    },
}

# Whose attention chooses tokens by a module named "indexer", without a gradient.
INDEXED = frozenset({"deepseek_v32", "glm_moe_dsa", "deepseek_v4"})

# Families that transformers may load, but that do not continue a text.
NOT_CHAT = {
    "bert": "an encoder",
    "roberta": "an encoder",
    "deberta": "an encoder",
    "deberta-v2": "an encoder",
    "t5": "an encoder-decoder",
    "whisper": "a speech recognizer",
    "vit": "an image classifier",
    "sam": "an image segmenter",
    "blip-2": "an image captioner",
}


def splits_of(config: Any) -> frozenset[str] | None:
    """What of the family of ``config`` can be split; None where nothing can."""
    if transformers_major() < 5:
        return SPLITS.get(config.model_type)
    found = {TP} if tp_plan(config) else set()
    found |= {PP, ALL_TO_ALL} if pp_plan(config) else set()
    if found >= {TP, PP}:
        found |= {SPLIT_GATHER, RING}
    return frozenset(found - set(_cannot(config))) or None


def _cannot(config: Any) -> dict[str, str]:
    """{what cannot be done with a model of ``config``: why}, under transformers 5."""
    text = text_config(config)
    found = dict(CANNOT.get(text.model_type, {}))
    if STATE_LAYERS & set(getattr(text, "layer_types", None) or ()):
        found[ALL_TO_ALL] = _STATES
    if getattr(text, "num_kv_shared_layers", 0):
        found[PP] = _SHARED
    if getattr(text, "hidden_size_per_layer_input", 0):
        found.setdefault(PP, "its layers are given embeddings of their own, which need the tokens")
    if text.model_type == "stablelm" and getattr(text, "qk_layernorm", False):
        found[TP] = "its heads have norms of their own (qk_layernorm)"
    if text.model_type == "falcon" and getattr(text, "alibi", False):
        found[TP] = "its position biases (alibi) are made for all heads at once"
    if text.model_type == "falcon" and getattr(text, "multi_query", False):
        if not getattr(text, "new_decoder_architecture", False):
            found[TP] = "all its heads share one key head (multi_query)"
    return found


def check_family(config: Any, options: ParallelOptions) -> None:
    """Raise ValueError, naming the flag and what to use instead, where ``options`` cannot train
    this family.

    ``config``: a model's configuration, so that it can be asked before weights are loaded.
    """
    family = config.model_type
    if family in NOT_CHAT:
        raise ValueError(
            f"{family} is {NOT_CHAT[family]}, not a causal language model: it cannot learn to "
            "chat; use a model that AutoModelForCausalLM is meant for, Llama or Qwen2 for instance"
        )
    if transformers_major() < 5:
        _check_old_policies(config, options)
    else:
        _check_plans(config, options)


def _check_plans(config: Any, options: ParallelOptions) -> None:
    family = text_config(config).model_type
    can = splits_of(config) or frozenset()
    reasons = _cannot(config)
    if GEMINI in reasons and PLUGINS[options.plugin].sharded_forward:
        raise ValueError(
            f"--plugin {options.plugin} is not possible with {family} models: {reasons[GEMINI]}; "
            "use --plugin zero2"
        )
    if PACKING in reasons and options.packing:
        raise ValueError(
            f"--packing is not possible with {family} models: {reasons[PACKING]}; drop --packing: "
            "rows of like length are batched together anyway"
        )
    if LORA_TP in reasons and options.lora and options.tp > 1:
        raise ValueError(
            f"--tp with LoRA is not possible with {family} models: {reasons[LORA_TP]}; use "
            "--plugin zero2"
        )
    for flag in sorted(_asked(options) - {_PACKS_PP, _PACKS_GEMINI_TP} - can):
        name = flag if flag.startswith("--") else f"--sp_mode {flag}"
        reason = reasons.get(flag, "neither transformers nor this library has a plan to split them")
        left = "".join(f"{flag} or " for flag in (TP, PP) if flag in can)
        raise ValueError(
            f"{name} is not possible with {family} models: {reason}; use {left}--plugin zero2"
        )


def _check_old_policies(config: Any, options: ParallelOptions) -> None:
    family = config.model_type
    asked = _asked(options)
    flags = asked - {_PACKS_PP, _PACKS_GEMINI_TP}
    can = splits_of(config)
    if can is None and (PLUGINS[options.plugin].hybrid or flags):
        flag = f"--plugin {options.plugin}" + (f" --tp {options.tp}" if options.tp > 1 else "")
        raise ValueError(
            f"{flag}: {family} models cannot be split, ColossalAI 0.5.0 has no working policy for "
            f"them (it has for {', '.join(SPLITS)}); use --plugin zero2 or --plugin gemini without "
            "--tp"
        )
    for flag in sorted(flags - (_ALL if can is None else can)):
        name = flag if flag.startswith("--") else f"--sp_mode {flag}"
        reason = _REASONS.get((family, flag), "ColossalAI 0.5.0 cannot do it there")
        left = " or ".join(flag for flag in (TP, PP) if flag in can)
        raise ValueError(
            f"{name} is not possible with {family} models: {reason}; use {left}, or --plugin zero2"
        )
    if family == "opt" and TP in flags and not getattr(config, "tie_word_embeddings", True):
        raise ValueError(
            "--tp is not possible with OPT models whose output embedding is not the input "
            "embedding (tie_word_embeddings false): ColossalAI 0.5.0 splits them into wrong "
            "logits; use --plugin zero2 or gemini"
        )
    for flag in sorted(asked & _NO_PACKS.get(family, frozenset())):
        raise ValueError(
            f"{flag} is not possible with {family} models: ColossalAI 0.5.0 makes masks and "
            "positions of its own there, which let the rows of a pack see each other; use --plugin "
            "zero2, or drop --packing"
        )


def _asked(options: ParallelOptions) -> frozenset[str]:
    """What of the table's flags ``options`` ask for."""
    sharded = PLUGINS[options.plugin].sharded_forward
    asked = {
        TP: options.tp > 1,
        PP: options.pp > 1,
        options.sp_mode: options.enable_sequence_parallelism,
        _PACKS_PP: options.packing and options.pp > 1,
        _PACKS_GEMINI_TP: options.packing and options.tp > 1 and sharded,
    }
    return frozenset(flag for flag, there in asked.items() if there)


def prepare_family(model: Any, options: ParallelOptions) -> list[str]:
    """Change ``model`` in place where its family needs it; return a sentence for each change a user
    should know."""
    family = model.config.model_type
    if caps_scores(model.config) and _attend_eagerly(model, instead_of=("sdpa",)):
        return [eager_note(model.config)]
    if text_config(model.config).model_type in INDEXED:
        for name, module in model.named_modules():
            if name.endswith(".indexer"):
                module.requires_grad_(False)
        return [f"the indexers of {family} models stay as they are: a choice has no gradient."]
    eager = None
    by_policy = PLUGINS[options.plugin].hybrid or options.tp > 1
    by_policy = by_policy and transformers_major() < 5
    if family == "opt" and by_policy:
        # shardformer/policies/opt.py:62 looks the attention class up by name and knows two names
        # only.
        eager = "ColossalAI 0.5.0 cannot split its SDPA attention"
    if family == "gpt2" and by_policy:
        # shardformer/modeling/gpt2.py:95 masks the padding only: eager attention adds the causal
        # mask itself, SDPA not.
        eager = "ColossalAI 0.5.0 gives its SDPA attention a mask that is not causal"
    if eager and _attend_eagerly(model):
        return [f"{family} runs eager attention here: {eager}."]
    if family == "falcon" and PLUGINS[options.plugin].sharded_forward:
        _use_plain_linears(model)
    return []


def _attend_eagerly(model: Any, instead_of: tuple[str, ...] = ()) -> bool:
    """Make every layer's attention eager, or those that are ``instead_of``; whether one was not. A
    model with a scalar head has another configuration than its layers."""
    changed = False
    for module in model.modules():
        attention = getattr(getattr(module, "config", None), "_attn_implementation", "eager")
        if attention in instead_of or not instead_of and attention != "eager":
            module.config._attn_implementation = "eager"
            changed = True
    return changed


def _use_plain_linears(model: Any) -> None:
    # FalconLinear multiplies by `weight.T`; Gemini sees a parameter only when it is handed to a
    # function.
    from types import MethodType

    from torch import nn

    for module in model.modules():
        if type(module).__name__ == "FalconLinear":
            module.forward = MethodType(nn.Linear.forward, module)
