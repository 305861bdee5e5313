# SPDX-License-Identifier: Apache-2.0
"""The published rules by which two tools decide if a span is a generation (an LLM call).

``LANGFUSE`` holds ``ObservationTypeMapperRegistry`` of Langfuse's repository (the file
``packages/shared/src/server/otel/ObservationTypeMapper.ts``), as it was on 22 August 2026. The
rules for Genkit, Flue, Vercel's SDK and old Langfuse SDKs are left out, because neither LiveKit nor
we set their attributes.

``PHOENIX`` holds ``_infer_span_kind`` of Phoenix's repository (``src/phoenix/trace/gen_ai/
conversion.py`` and ``src/phoenix/trace/otel.py``), as it was on 21 August 2026. Phoenix derives the
OpenInference span kind from the GenAI attributes, unless the span has ``openinference.span.kind``.
"""

from __future__ import annotations

GENERATION = {"GENERATION", "LLM"}

LANGFUSE = [
    ("attribute", "langfuse.observation.type", {"span": "SPAN", "generation": "GENERATION"}),
    (
        "attribute",
        "openinference.span.kind",
        {
            "CHAIN": "CHAIN",
            "RETRIEVER": "RETRIEVER",
            "LLM": "GENERATION",
            "EMBEDDING": "EMBEDDING",
            "AGENT": "AGENT",
            "TOOL": "TOOL",
            "GUARDRAIL": "GUARDRAIL",
            "EVALUATOR": "EVALUATOR",
        },
    ),
    (
        "attribute",
        "gen_ai.operation.name",
        {
            "chat": "GENERATION",
            "completion": "GENERATION",
            "text_completion": "GENERATION",
            "generate_content": "GENERATION",
            "generate": "GENERATION",
            "embeddings": "EMBEDDING",
            "invoke_agent": "AGENT",
            "create_agent": "AGENT",
            "execute_tool": "TOOL",
        },
    ),
    ("any of", ["gen_ai.tool.name", "gen_ai.tool.call.id"], "TOOL"),
    (
        "name in scope livekit-agents",
        {"agent_turn": "AGENT", "start_agent_activity": "AGENT", "function_tool": "TOOL"},
        None,
    ),
    (
        "any of",
        [
            "langfuse.observation.model.name",
            "gen_ai.request.model",
            "gen_ai.response.model",
            "llm.model_name",
            "model",
        ],
        "GENERATION",
    ),
]
"""The rules in their order. An unknown value of an attribute leads to the next rule."""

PHOENIX = [
    ("attribute", "openinference.span.kind", {"LLM": "LLM", "CHAIN": "CHAIN"}),
    (
        "attribute, final",
        "gen_ai.operation.name",
        {
            "chat": "LLM",
            "text_completion": "LLM",
            "generate_content": "LLM",
            "embeddings": "EMBEDDING",
            "execute_tool": "TOOL",
            "retrieval": "RETRIEVER",
            "invoke_agent": "AGENT",
            "create_agent": "AGENT",
        },
    ),
    ("any of", ["gen_ai.tool.call.id", "gen_ai.tool.name"], "TOOL"),
    ("any of", ["gen_ai.retrieval.documents", "gen_ai.retrieval.query.text"], "RETRIEVER"),
    ("any of", ["gen_ai.embeddings.dimension.count"], "EMBEDDING"),
    (
        "any of",
        ["gen_ai.input.messages", "gen_ai.output.messages", "gen_ai.request.model"],
        "LLM",
    ),
]
"""Likewise. An unknown operation name is final: the kind of such a span is unknown."""

RULES = {"langfuse": LANGFUSE, "phoenix": PHOENIX}


def kind(rules, span):
    """Return the type that these rules give to a span, or None if no rule matches."""
    attributes = span.attributes
    for condition, subject, outcome in rules:
        if condition.startswith("attribute"):
            if not attributes.get(subject):
                continue
            found = outcome.get(attributes[subject])
            if found or condition.endswith("final"):
                return found
        elif condition == "any of":
            if any(attributes.get(name) for name in subject):
                return outcome
        elif span.instrumentation_scope.name == "livekit-agents" and span.name in subject:
            return subject[span.name]
    return None


def generations(rules, spans):
    """Return the names of the spans that count as a generation."""
    return [span.name for span in spans if kind(rules, span) in GENERATION]
