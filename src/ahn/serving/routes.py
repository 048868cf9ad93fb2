"""The routes that write: `/v1/chat/completions` and `/v1/completions`; and the list of models."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, StreamingResponse

from ahn.models.text import text_of
from ahn.serving.answers import AnswerShape, ChatShape
from ahn.serving.conversation import chat_prompt
from ahn.serving.errors import RequestError
from ahn.serving.requests import Generation
from ahn.serving.schema import ChatRequest, CompletionRequest, SamplingOptions
from ahn.serving.service import Service, increments_of, sampling_of, sent

router = APIRouter(prefix="/v1")


@router.get("/models")
async def models(request: Request) -> dict[str, Any]:
    """The one model that is served."""
    return {"object": "list", "data": [_model(request.app.state.service)]}


@router.get("/models/{name:path}")
async def model(request: Request, name: str) -> dict[str, Any]:
    """A model by its name."""
    service: Service = request.app.state.service
    service.check_model(name)
    return _model(service)


@router.post("/chat/completions", response_model=None)
async def chat_completions(request: Request, body: ChatRequest) -> Any:
    """Answers a conversation."""
    service: Service = request.app.state.service
    service.check_model(body.model)
    if body.top_logprobs is not None and not body.logprobs:
        raise RequestError("top_logprobs needs logprobs: true", param="top_logprobs")
    # In a thread, as what follows in `completions`: nobody's stream waits while a long prompt is tokenised.
    prompt = await asyncio.to_thread(
        chat_prompt, service.engine.tokenizer, body.messages, body.ahn.document is not None
    )
    sampling = sampling_of(body, (body.top_logprobs or 0) if body.logprobs else None)
    generation = service.generation(
        body, prompt.tokens, limit=body.limit, sampling=sampling, marks=prompt.marks, root=body.ahn.document or ""
    )
    shape = ChatShape(service.name, service.engine.tokenizer, [generation], service.document_tokens(generation.root))
    return await _answer(request, service, shape, body)


@router.post("/completions", response_model=None)
async def completions(request: Request, body: CompletionRequest) -> Any:
    """Continues one or more texts."""
    service: Service = request.app.state.service
    service.check_model(body.model)
    if body.echo and (body.stream or body.ahn.document):
        raise RequestError("echo goes neither with stream nor with a document; leave one out", param="echo")
    if body.max_tokens == 0 and not body.echo:
        raise RequestError("max_tokens must be at least 1 without echo", param="max_tokens")
    prompts, most = body.prompts, service.settings.max_queue
    if not prompts:
        raise RequestError("the prompt is empty; send one token at least", param="prompt")
    if len(prompts) > most:
        raise RequestError(f"{len(prompts):,} prompts at once, but this server takes {most:,}", param="prompt")
    root = body.ahn.document or ""
    generations = await asyncio.to_thread(
        lambda: [_completion(service, body, service.text_prompt(each, bool(root))) for each in prompts]
    )
    tokenizer: Any = service.engine.tokenizer
    prefix = [text_of(tokenizer, each.tokens) for each in generations for _ in range(body.n)] if body.echo else []
    shape = AnswerShape(service.name, tokenizer, generations, service.document_tokens(root), prefix)
    return await _answer(request, service, shape, body)


def _completion(service: Service, body: CompletionRequest, tokens: list[int]) -> Generation:
    scores = body.echo and body.logprobs is not None
    return service.generation(
        body,
        tokens,
        limit=body.max_tokens,
        sampling=sampling_of(body, body.logprobs),
        marks=[] if scores else [len(tokens)],
        root=body.ahn.document or "",
        echo=scores,
    )


async def _answer(request: Request, service: Service, shape: AnswerShape, options: SamplingOptions) -> Any:
    """Sends a request to the engine; its answer, whole or as a stream."""
    sending = sent(request, service.engine, shape.generations)
    if not options.stream:
        async with sending:
            return JSONResponse(shape.whole([each async for each in increments_of(shape.generations)]))
    await sending.__aenter__()  # before the stream begins, so that a busy server can still say so
    with_usage = options.stream_options is not None and options.stream_options.include_usage

    async def events() -> Any:
        try:
            async for event in shape.events(increments_of(shape.generations), with_usage):
                yield event
        finally:
            await sending.__aexit__(None, None, None)

    return StreamingResponse(events(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})


def _model(service: Service) -> dict[str, Any]:
    return {"id": service.name, "object": "model", "created": service.started, "owned_by": "ahn"}
