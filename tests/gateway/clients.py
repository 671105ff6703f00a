"""Sends requests with aiocoap, one after the other from one endpoint: each line of the standard input holds one as JSON,
each line of the standard output its response, or null if none came."""

import asyncio
import json
import sys

from aiocoap import Context, Message, Reliable, Unreliable
from aiocoap.numbers import codes
from aiocoap.numbers.optionnumbers import OptionNumber
from aiocoap.util import linkformat

LINK_FORMAT = 40


async def exchange(context, wanted):
    request = Message(
        code=getattr(codes, wanted.get("method", "POST")),
        uri=wanted["uri"],
        payload=wanted.get("payload", "").encode(),
        transport_tuning=Reliable if wanted.get("confirmable", True) else Unreliable,
    )
    for number, value in wanted.get("options", []):
        option = OptionNumber(number).create_option(decode=bytes(value))
        request.opt.add_option(option)
    await context.find_remote_and_interface(request)
    request.remote.maximum_block_size_exp = wanted.get("block", 1024).bit_length() - 5
    try:
        response = await asyncio.wait_for(context.request(request).response, wanted.get("patience", 15))
    except asyncio.TimeoutError:
        return None
    text = response.payload.decode()
    if response.opt.content_format == LINK_FORMAT:
        text = [[link.href, link.attr_pairs] for link in linkformat.parse(text).links]
    return [response.code.dotted, text]


async def main():
    context = await Context.create_client_context()
    for line in sys.stdin:
        print(json.dumps(await exchange(context, json.loads(line))), flush=True)
    await context.shutdown()


asyncio.run(main())
