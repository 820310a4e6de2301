"""A bridge to a model in another process, as vLLM's are: no hook of ours runs there."""

from __future__ import annotations

import pytest
import tiny
import torch
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
from transformer_lens.model_bridge.driver_protocol import ForwardResult
from transformer_lens.model_bridge.remote_bridge import RemoteBridge
from transformer_lens.model_bridge.sources._driver_base import DriverBase

import sat_lens as sl
from sat_lens.errors import UnsupportedModelError
from sat_lens.intervention import observe_attention, verify_sites


class Elsewhere(DriverBase):
    """A driver that serves a hook point for patterns and runs no module here."""

    supported_hook_points = frozenset({"blocks.0.attn.hook_pattern"})

    def forward(self, input_ids=None, **kwargs):
        return ForwardResult(logits=torch.zeros(*input_ids.shape, 96))


WAYS = {
    "saturate": lambda model: sl.saturate(model).__enter__(),
    "one head": lambda model: sl.saturate(model, "L0H0").__enter__(),
    "replace": lambda model: sl.replace_attention(model, lambda scores: scores).__enter__(),
    "observe": lambda model: observe_attention(model, lambda _site, _scores: None).__enter__(),
    "hooks": sl.saturation_hooks,
    "sites": sl.attention_sites,
    "verify": verify_sites,
    "pair": lambda model: sl.run_with_saturation_cache(model, tiny.tokens()),
    "roles": lambda model: sl.head_roles(model, tiny.tokens(), progress=False),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_model_that_runs_elsewhere(way):
    config = TransformerBridgeConfig(**tiny.NATIVE, architecture="TransformerLensNative")
    adapter = ArchitectureAdapterFactory.select_architecture_adapter(config)
    remote = RemoteBridge(adapter, None, Elsewhere(config, None))
    assert remote.forward(tiny.tokens()).shape == (2, 10, 96)
    with pytest.raises(UnsupportedModelError, match=r"RemoteBridge.*another process.*boot_trans"):
        way(remote)
