"""What KServe's own client gets, as JSON; it runs in an environment of its own: `kserve_client.py URL PICTURE`."""

import asyncio
import base64
import json
import sys
from pathlib import Path

import httpx
import numpy as np
from kserve import InferenceRESTClient, InferInput, InferRequest, RESTConfig

MODEL = "colours"


def tensor(*pictures: bytes) -> InferRequest:
    """Return a request of version 2 with the pictures in the binary form."""
    given = InferInput("picture", [len(pictures)], "BYTES")
    given.set_data_from_numpy(np.array(pictures, dtype=object), binary_data=True)
    return InferRequest(MODEL, [given], request_id="7")


async def main(url: str, picture: bytes) -> None:
    """Ask everything once."""
    old, new = (InferenceRESTClient(RESTConfig(protocol=version)) for version in ("v1", "v2"))
    instances = [{"b64": base64.b64encode(each).decode()} for each in (picture, b"no picture")]
    seen = {
        "ready": [await old.is_model_ready(url, MODEL), await new.is_model_ready(url, MODEL)],
        "other": await new.is_model_ready(url, "nothing"),
        "server": [await new.is_server_live(url), await new.is_server_ready(url)],
        "old": await old.infer(url, {"instances": instances}, model_name=MODEL),
        "new": (await new.infer(url, tensor(picture, b"no picture"), model_name=MODEL)).to_dict(),
    }
    try:
        await new.infer(url, tensor(b"no picture"), model_name=MODEL)
    except httpx.HTTPStatusError as error:
        seen["refused"] = error.response.status_code
    sys.stdout.write(json.dumps(seen))


asyncio.run(main(sys.argv[1], Path(sys.argv[2]).read_bytes()))
