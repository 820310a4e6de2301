"""What a parameter is, read from its name: its component, stack, layer and projection.

A checkpoint file gives nothing but names, so only names are used, for models in memory too: a model
and its checkpoint are then sorted alike. What no rule recognises is ``other``.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Set

COMPONENTS = (
    "embedding",
    "qk",
    "ov",
    "attention",
    "mlp",
    "layer norm",
    "unembedding",
    "other",
)
# Wrappers that stand between a module and its name: TransformerLens, DataParallel, torch.compile.
_WRAPPERS = ("_original_component.", "original_model.", "_orig_mod.")
# What model families call the projections of an attention module.
_LEAVES = {
    "q": "q q_proj query q_lin query_proj linear_q wq w_q b_q",
    "k": "k k_proj key k_lin key_proj linear_k wk w_k _w_k b_k _b_k",
    "v": "v v_proj value v_lin value_proj linear_v wv w_v _w_v b_v _b_v",
    "o": "o o_proj out_proj dense c_proj output out_lin linear_out wo w_o b_o",
    "joint": "c_attn qkv_proj wqkv qkv in_proj_weight in_proj_bias",
    "interleaved": "query_key_value",
    "q_a": "q_a_proj",
    "q_b": "q_b_proj",
    "kv_a": "kv_a_proj_with_mqa",
    "kv_b": "kv_b_proj",
}
_PROJECTION = {leaf: projection for projection, ls in _LEAVES.items() for leaf in ls.split()}
_COMPONENT = {"q": "qk", "k": "qk", "q_a": "qk", "q_b": "qk", "v": "ov", "o": "ov"}
_ONLY_SCORES = ("relative_attention_bias", "sinks")
_STACKS = ("vision", "encoder", "decoder")
# Joint matrices, and the names of the parts that a TransformerBridge splits them into.
_PARTS = {
    "qkv": ("q", "k", "v"),
    "gate_up_proj": ("gate", "in"),
    "input_linear": ("gate", "in"),
}
_NORM = re.compile(r"norm|^ln(\d*|f|out|final|pre|post)(_\w+)?$|_ln$", re.IGNORECASE)
_INNER_NORM = re.compile(
    r"^(q|k|v|qk|kv|query|key|value)_(\w+_)?(layer_?norm|norm|ln)$", re.IGNORECASE
)
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_LINEAR_ATTENTION = re.compile(r"linear_attn|linear_attention", re.IGNORECASE)
_CROSS = re.compile(r"cross|encdec|encoder_attn", re.IGNORECASE)
_MLP = re.compile(
    r"mlp|ffn|feed_?forward|dense|^fc\d|^w[123]$|^linear[12]$|expert|router|moe|^intermediate$|^output$",
    re.IGNORECASE,
)
_UNEMBEDDING = re.compile(
    r"head$|unembed|embed_out|classifier|^cls$|^score$|final_logits_bias|^w_u$|^b_u$", re.I
)
_EMBEDDING = re.compile(r"embed|emb$|^wte$|^wpe$|^shared$|^pos$|cls_token|^w_e$|^w_pos$", re.I)


@dataclasses.dataclass(frozen=True)
class ParameterPlace:
    """Where a parameter belongs.

    Attributes:
        component: One of :data:`COMPONENTS`; ``attention`` is what serves both halves of an
            attention module or cannot be split between them.
        stack: ``"encoder"``, ``"decoder"`` or ``"vision"`` where there are several, else ``""``.
        layer: The block's index, None outside blocks.
        attention: Path of its attention module, ``""`` outside attention.
        projection: Which projection of the attention module it belongs to, ``""`` if none is known.
        cross: Whether the attention module is a cross-attention.
        bias: Whether it is a bias.
    """

    component: str
    stack: str
    layer: int | None
    attention: str = ""
    projection: str = ""
    cross: bool = False
    bias: bool = False

    @property
    def label_stack(self) -> str:
        """The stack that the labels of its heads name."""
        return "cross" if self.cross else self.stack

    @property
    def layer_label(self) -> str:
        """The layer with its stack, such as ``"decoder.L3"``; ``"outside"`` outside blocks."""
        if self.layer is None:
            return "outside"
        return f"{self.stack}.L{self.layer}" if self.stack else f"L{self.layer}"


def canonical_name(name: str) -> str:
    """Strip the wrappers from a parameter's name."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name.removeprefix("module.").removeprefix("base_model.model.")


def parameter_places(names: Iterable[str]) -> dict[str, ParameterPlace]:
    """Sort parameters by name; a stack is named only where there are several.

    Stacks of attention that no rule knows go by the first part in which their names differ.
    """
    listed = list(names)
    attention = _attention_modules(listed)
    found = {name: _place(name, attention) for name in listed}
    if len({place.stack for place in found.values() if place.layer is not None}) < 2:
        found = {name: dataclasses.replace(place, stack="") for name, place in found.items()}
    stacks = _ambiguous_stacks(found)
    for name, place in found.items():
        if place.layer is not None and _before_blocks(name) in stacks:
            found[name] = dataclasses.replace(place, stack=stacks[_before_blocks(name)])
    return found


def superseded(names: Iterable[str]) -> set[str]:
    """Return the joint matrices whose parts stand beside them.

    A TransformerBridge splits joint projections and keeps the original; counting both would count
    the same weights twice.
    """
    known = set(names)
    found = set()
    for name in known:
        module, _, last = name.rpartition(".")
        parent, _, leaf = module.rpartition(".")
        parts = _PARTS.get(leaf, ())
        if parts and all(f"{parent}.{part}.{last}" in known for part in parts):
            found.add(name)
    return found


def is_joint(name: str) -> bool:
    """Whether a parameter is a joint matrix, which a TransformerBridge splits."""
    (place,) = parameter_places([name]).values()
    joint = place.projection in ("joint", "interleaved")
    return joint or name.removesuffix(".weight").rpartition(".")[2] in _PARTS


def is_inner_norm(name: str, of: str) -> bool:
    """Whether a module or parameter is a norm inside attention of queries, keys or values.

    Args:
        name: Its name.
        of: First letters of what is normalised: ``"qkv"``, or some of them.
    """
    parts = name.split(".")
    at = next((i for i, part in enumerate(parts) if _ATTENTION.search(part)), len(parts))
    return any(_INNER_NORM.match(part) and part[0].lower() in of for part in parts[at + 1 :])


def _attention_modules(names: Iterable[str]) -> set[str]:
    """Return the modules that have all four projections, whatever they are called themselves."""
    projections: dict[str, set[str]] = {}
    for name in names:
        module, _, leaf = name.removesuffix(".weight").rpartition(".")
        projections.setdefault(module, set()).add(_PROJECTION.get(leaf.lower(), ""))
    return {module for module, found in projections.items() if found >= {"q", "k", "v", "o"}}


def _place(name: str, attention: Set[str]) -> ParameterPlace:
    parts = name.split(".")
    # The first number is the block's index, except that of a convolution.
    index = next(
        (i for i, part in enumerate(parts) if part.isdigit() and "conv" not in "".join(parts[:i])),
        None,
    )
    layer = None if index is None else int(parts[index])
    stack = next((s for s in _STACKS if any(p.startswith(s) for p in parts[:index])), "")
    bias = parts[-1].lower().endswith("bias") or parts[-1].lower().startswith(("b_", "_b_"))
    modules = parts if parts[-1] not in ("weight", "bias", "w", "b") else parts[:-1]
    if any(_NORM.search(part) for part in modules):
        return ParameterPlace("layer norm", stack, layer, bias=bias)
    paths = [".".join(modules[: i + 1]) for i in range(len(modules))]
    at = next(
        (i for i, path in enumerate(paths) if _ATTENTION.search(modules[i]) or path in attention),
        None,
    )
    if at is None or layer is None or _LINEAR_ATTENTION.search(modules[at]):
        return ParameterPlace(_component_outside_attention(modules, layer), stack, layer, bias=bias)
    leaf = modules[-1].lower()
    # Experts inside attention have matrices of any name, and no heads of their own.
    projection = "" if "experts" in modules else _PROJECTION.get(leaf, "")
    return ParameterPlace(
        "qk" if leaf.endswith(_ONLY_SCORES) else _COMPONENT.get(projection, "attention"),
        stack,
        layer,
        attention=paths[at],
        projection=projection,
        cross=any(_CROSS.search(part) for part in modules[at:]),
        bias=bias,
    )


def _component_outside_attention(modules: list[str], layer: int | None) -> str:
    def named(pattern: re.Pattern[str]) -> bool:
        return any(pattern.search(part) for part in modules)

    if layer is not None:
        return "mlp" if named(_MLP) and not named(_LINEAR_ATTENTION) else "other"
    if named(_UNEMBEDDING) or modules == ["decoder"]:
        return "unembedding"
    return "embedding" if named(_EMBEDDING) else "other"


def _ambiguous_stacks(places: Mapping[str, ParameterPlace]) -> dict[str, str]:
    """Name the stacks whose attention modules would share their labels, by their prefixes."""
    sharing: dict[tuple[str, int | None, bool], set[str]] = {}
    for name, place in places.items():
        if place.projection:
            key = (place.stack, place.layer, place.cross)
            sharing.setdefault(key, set()).add(_before_blocks(name))
    named: dict[str, str] = {}
    for prefixes in sharing.values():
        if len(prefixes) > 1:
            parts = {prefix: prefix.split(".") for prefix in prefixes}
            columns = zip(*parts.values(), strict=False)
            at = next((i for i, column in enumerate(columns) if len(set(column)) > 1), 0)
            named |= {prefix: part[at] for prefix, part in parts.items()}
    return named


def _before_blocks(name: str) -> str:
    """Return the part of a name before a block's index."""
    return re.split(r"\.\d+\.", name, maxsplit=1)[0]
