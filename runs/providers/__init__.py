"""Clients of model services. `port` is what the engine sees of them; each other module is one service."""

from runs.providers.port import (
    Finished,
    ModelEvent,
    ModelRequest,
    Provider,
    ProviderError,
    ReasoningDelta,
    TextDelta,
    ToolCallDelta,
    ToolSpec,
    UnknownProvider,
    UsageReported,
    forget_providers,
    get_provider,
    parse_arguments,
    register_provider,
)

__all__ = [
    "Finished",
    "ModelEvent",
    "ModelRequest",
    "Provider",
    "ProviderError",
    "ReasoningDelta",
    "TextDelta",
    "ToolCallDelta",
    "ToolSpec",
    "UnknownProvider",
    "UsageReported",
    "forget_providers",
    "get_provider",
    "parse_arguments",
    "register_provider",
]
