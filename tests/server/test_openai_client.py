"""The official Python client works unchanged."""

from __future__ import annotations

import asyncio

import openai
import pytest

from tests.server.served import Served

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Grüß Gott 🙂"}]
GREEDY = {"model": "tiny", "temperature": 0, "max_tokens": 12}


@pytest.fixture(scope="module")
def client(server: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def test_models_are_listed_and_found(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").object == "model"
    with pytest.raises(openai.NotFoundError) as error:
        client.models.retrieve("org/other")
    assert error.value.code == "model_not_found"


def test_a_chat_is_answered_and_its_stream_adds_up_to_the_same(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(messages=CHAT, **GREEDY)
    assert whole.object == "chat.completion"
    assert whole.choices[0].message.role == "assistant"
    assert whole.usage is not None and whole.usage.completion_tokens <= 12
    stream = client.chat.completions.create(
        messages=CHAT, stream=True, stream_options={"include_usage": True}, **GREEDY
    )
    chunks = list(stream)
    deltas = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert deltas[0].delta.role == "assistant"
    text = "".join(choice.delta.content or "" for choice in deltas)
    assert text == whole.choices[0].message.content
    assert [c.finish_reason for c in deltas if c.finish_reason] == [whole.choices[0].finish_reason]
    assert chunks[-1].usage == whole.usage and not chunks[-1].choices
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_a_completion_is_answered_and_its_stream_adds_up_to_the_same(client: openai.OpenAI) -> None:
    asked = {"prompt": ["The quick", "naïve"], "n": 2, "logprobs": 3, "seed": 7, "max_tokens": 9}
    asked |= {"temperature": 1, "model": "tiny", "echo": True}
    whole = client.completions.create(**asked)
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
    assert whole.choices[0].text != whole.choices[1].text
    texts, tokens, offsets = [""] * 4, [[], [], [], []], [[], [], [], []]
    for chunk in client.completions.create(stream=True, **asked):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            tokens[choice.index] += choice.logprobs.tokens
            offsets[choice.index] += choice.logprobs.text_offset
    assert texts == [choice.text for choice in whole.choices]
    assert tokens == [choice.logprobs.tokens for choice in whole.choices]
    assert offsets == [choice.logprobs.text_offset for choice in whole.choices]


def test_the_stream_helper_gives_the_final_completion(client: openai.OpenAI) -> None:
    asked = {"messages": CHAT, "model": "tiny", "temperature": 0, "stop": ["\n"], "seed": 1}
    with client.chat.completions.stream(max_tokens=200, **asked) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= kinds
    assert final.choices[0].finish_reason == "stop"


def test_log_probabilities_of_a_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(messages=CHAT, logprobs=True, top_logprobs=4, **GREEDY)
    content = answer.choices[0].logprobs.content
    assert answer.usage.completion_tokens == len(content)
    for token in content:
        assert len(token.top_logprobs) == 4
        assert token.top_logprobs[0].token == token.token  # greedy
        assert token.logprob == token.top_logprobs[0].logprob <= 0
        assert bytes(token.bytes).decode(errors="replace") == token.token


def test_faults_are_the_client_s_own_exceptions(client: openai.OpenAI, server: Served) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(messages=CHAT, model="tiny", temperature=-1)
    assert (bad.value.param, bad.value.type) == ("temperature", "invalid_request_error")
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(messages=CHAT, model="gpt-5")


def test_the_asynchronous_client_streams_many_at_once(server: Served) -> None:
    """32 streams of different prompts: each is what the same request gives alone."""
    prompts = [f"{i} is the number and {'fox ' * (i % 7)}" for i in range(32)]

    def asked(i: int) -> dict:
        sampling = {"temperature": 0} if i % 2 else {"temperature": 1.0, "seed": i, "top_p": 0.9}
        return {"model": "tiny", "prompt": prompts[i], "max_tokens": 8 + i % 9, **sampling}

    async def together() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:

            async def one(i: int) -> str:
                stream = await client.completions.create(stream=True, **asked(i))
                return "".join([c.choices[0].text async for c in stream])

            return await asyncio.gather(*(one(i) for i in range(32)))

    got = asyncio.run(together())
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    alone = [client.completions.create(**asked(i)).choices[0].text for i in range(32)]
    assert got == alone
