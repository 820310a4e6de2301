"""Programs of selections and averages, compiled to a transformer by hand and interpreted apart.

A head selects, for each position, the keys whose value in one slot matches its own value in
another, and writes the average of a third slot over them to a fourth. That is what RASP calls
select and aggregate; where nothing is selected, everything is. The compiler writes weights, the
interpreter counts in fractions, and neither knows of the other.
"""

import dataclasses
from collections.abc import Callable
from fractions import Fraction

import torch
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge import TransformerBridge

N_CTX = 16
N_TOKENS = 8
SHARPNESS = 400.0


@dataclasses.dataclass(frozen=True)
class Selection:
    """One head: it selects keys by a test of two slots, and averages ``value`` into ``to``."""

    query: str
    key: str
    test: Callable[[int, int], bool]
    value: str
    to: str


def always(_query, _key):
    return True


def equal(query, key):
    return query == key


PREVIOUS = Selection("position", "position", lambda q, k: k == q - 1, "token", "before")
ALL = Selection("token", "token", always, "token", "shares")
SAME = Selection("token", "token", equal, "position", "places")
AFTER_SAME = Selection("token", "before", equal, "token", "answer")
MIRRORED = Selection("position", "position", lambda q, k: k == N_CTX - 1 - q, "token", "answer")


@dataclasses.dataclass(frozen=True)
class Program:
    """Heads by layer; the logits are the values of the slot ``output``."""

    layers: tuple[tuple[Selection, ...], ...]
    output: str
    causal: bool

    @property
    def slots(self):
        """Where each slot lies in the residual stream."""
        names = ["token", "position", *(head.to for layer in self.layers for head in layer)]
        places, start = {}, 0
        for name in dict.fromkeys(names):
            width = N_CTX if name in ("position", "places") else N_TOKENS
            places[name] = slice(start, start + width)
            start += width
        return places


PROGRAMS = {
    "fraction so far": Program(((ALL,),), "shares", causal=True),
    "reverse": Program(((MIRRORED, SAME),), "answer", causal=False),
    "induction": Program(((PREVIOUS, ALL), (AFTER_SAME, SAME)), "answer", causal=True),
}


def compiled(program):
    """Write the weights of a model that runs the program."""
    slots = program.slots
    n_heads = len(program.layers[0])
    model = TransformerBridge.boot_native(
        TransformerBridgeConfig(
            d_model=max(place.stop for place in slots.values()),
            d_head=N_CTX,
            n_heads=n_heads,
            n_layers=len(program.layers),
            n_ctx=N_CTX,
            d_vocab=N_TOKENS,
            act_fn="gelu",
            attn_only=True,
            normalization_type=None,
            attention_dir="causal" if program.causal else "bidirectional",
            seed=0,
        )
    ).eval()
    weights = dict(model.original_model.named_parameters())
    with torch.no_grad():
        for parameter in weights.values():
            parameter.zero_()
        _matrix(weights, "tok_embed")[:, slots["token"]] = torch.eye(N_TOKENS)
        _matrix(weights, "pos.")[:, slots["position"]] = torch.eye(N_CTX)
        _matrix(weights, "head.")[:, slots[program.output]] = torch.eye(N_TOKENS)
        for i, layer in enumerate(program.layers):
            own = {n: p for n, p in weights.items() if n.startswith(f"layers.{i}.")}
            for j, head in enumerate(layer):
                _write(own, head, slots, slice(j * N_CTX, (j + 1) * N_CTX))
    return model


def _write(weights, head, slots, part):
    q, k, v, o = (_matrix(weights, f"attn._original_component.{name}.") for name in "qkvo")
    query, key, value, to = (slots[n] for n in (head.query, head.key, head.value, head.to))
    widths = [range(place.stop - place.start) for place in (query, key)]
    table = torch.tensor([[float(head.test(a, b)) for b in widths[1]] for a in widths[0]])
    # The model divides scores by the square root of the head size.
    q[part, query][: table.shape[1]] = table.T * SHARPNESS * N_CTX**0.5
    k[part, key][: table.shape[1]] = torch.eye(table.shape[1])
    width = value.stop - value.start
    v[part, value][:width] = torch.eye(width)
    o[to, part][:, :width] = torch.eye(width)


def _matrix(weights, part):
    return next(p for name, p in weights.items() if part in name and name.endswith("weight"))


def interpret(program, tokens):
    """Run the program on one sequence.

    Returns:
        The selected keys of each query, by layer and head, and the outputs as fractions.
    """
    n = len(tokens)
    slots = {
        "token": [_one_hot(t, N_TOKENS) for t in tokens],
        "position": [_one_hot(i, N_CTX) for i in range(n)],
    }
    selected = {}
    for i, layer in enumerate(program.layers):
        written = {}
        for j, head in enumerate(layer):
            keys = [_select(program, head, slots, q, n) for q in range(n)]
            selected[i, j] = keys
            written[head.to] = [_average(slots[head.value], chosen) for chosen in keys]
        slots |= written
    return selected, slots[program.output]


def _select(program, head, slots, query, n):
    visible = range(query + 1) if program.causal else range(n)
    own = slots[head.query][query].index(1)
    chosen = [k for k in visible if head.test(own, slots[head.key][k].index(1))]
    return chosen or list(visible)


def _average(values, chosen):
    columns = zip(*(values[k] for k in chosen), strict=True)
    return [sum(column, Fraction(0)) / len(chosen) for column in columns]


def _one_hot(place, width):
    return [Fraction(int(i == place)) for i in range(width)]
