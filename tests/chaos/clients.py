"""Clients in a process of their own, so that a router does not share its interpreter with its load. Run by path.

``clients.py hold HOST PORT COUNT BODY`` opens COUNT streams, prints ``streaming`` when each has had a token, and goes on
reading until it is killed. ``clients.py load HOST PORT GRPC_PORT COUNT RATE BODY PROMPT`` sends COUNT requests at RATE
a second, every second one over gRPC, whatever becomes of them, and prints a JSON list of what did.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any

import grpc

from prismserve.protocol import prismserve_pb2 as pb
from prismserve.protocol import prismserve_pb2_grpc as rpc


def request(host: str, body: str) -> bytes:
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body.encode())}\r\nConnection: close\r\n\r\n{body}".encode()


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


async def hold(host: str, port: int, count: int, body: str) -> None:
    begun = asyncio.Semaphore(0)

    async def one() -> None:
        reader, writer = await asyncio.open_connection(host, port)
        writer.write(request(host, body))
        while line := await reader.readline():
            if line.startswith(b"data: ") and b'"content":' in line and b'"content": ""' not in line:
                break
        begun.release()
        while await reader.read(4096):
            pass

    tasks = []
    for number in range(count):
        tasks.append(asyncio.create_task(one()))
        if number % 50 == 49:
            await asyncio.sleep(0.05)
    for _ in range(count):
        await begun.acquire()
    say("streaming")
    await asyncio.gather(*tasks)


async def over_http(host: str, port: int, body: str) -> dict[str, Any]:
    reader, writer = await asyncio.open_connection(host, port)
    began_s = time.perf_counter()
    writer.write(request(host, body))
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    answered_s = time.perf_counter() - began_s
    first_s = 0.0
    while line := await reader.readline():
        if line.startswith(b"data: ") and not first_s:
            first_s = time.perf_counter() - began_s
    writer.close()
    return {
        "door": "http",
        "status": int(head.split()[1]),
        "answered_s": answered_s,
        "first_s": first_s,
        "ended_s": time.perf_counter() - began_s,
        "retry_after": "retry-after:" in head.lower(),
    }


async def over_grpc(stub: Any, prompt: str) -> dict[str, Any]:
    began_s = time.perf_counter()
    first_s = 0.0
    sampling = pb.SamplingParams(max_tokens=160, temperature=0, ignore_eos=True)
    call = stub.Generate(pb.GenerateRequest(prompt=prompt, sampling=sampling))
    status, retry = "OK", False
    try:
        async for _ in call:
            first_s = first_s or time.perf_counter() - began_s
    except grpc.aio.AioRpcError as error:
        status = error.code().name
        retry = "retry-after" in dict(error.trailing_metadata() or ())
    ended_s = time.perf_counter() - began_s
    return {
        "door": "grpc",
        "status": status,
        "answered_s": ended_s,
        "first_s": first_s,
        "ended_s": ended_s,
        "retry_after": retry,
    }


async def load(host: str, port: int, grpc_port: int, count: int, rate: float, body: str, prompt: str) -> None:
    async with grpc.aio.insecure_channel(f"{host}:{grpc_port}") as channel:
        await channel.channel_ready()
        stub = rpc.InferenceStub(channel)
        began_s = time.monotonic()
        tasks = []
        for number in range(count):
            await asyncio.sleep(max(0.0, began_s + number / rate - time.monotonic()))
            work = over_grpc(stub, prompt) if number % 2 else over_http(host, port, body)
            tasks.append(asyncio.create_task(work))
        say(json.dumps(await asyncio.gather(*tasks)))


if __name__ == "__main__":
    mode, host, port, *rest = sys.argv[1:]
    if mode == "hold":
        asyncio.run(hold(host, int(port), int(rest[0]), rest[1]))
    else:
        asyncio.run(load(host, int(port), int(rest[0]), int(rest[1]), float(rest[2]), rest[3], rest[4]))
