"""limner models pull: a model from the hub into its cache."""

from __future__ import annotations

from limner.config import PullModelConfig
from limner.errors import ModelError
from limner.models import hub, loading


def run(config: PullModelConfig) -> None:
    """Fetch a model, safetensors only, and print the folder that it lies in then. Raises ModelError."""
    if not loading.is_hub_id(config.model):
        raise ModelError(f"{config.model} is here already, or no hub id; name one, as owner/name.")
    folder = hub.fetch(config.model)
    hub.fetch_card(config.model)
    print(folder)
