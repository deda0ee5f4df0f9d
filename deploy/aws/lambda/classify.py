"""The Lambda function before the SageMaker endpoint: a picture by URL or in base64 in, the endpoint's answer out.

The event is `{"url": "https://..."}` or `{"data": "<base64>"}`, or what API Gateway and function URLs make of a request
with that, or with a picture, as its body. The endpoint's container fetches the URL, by its own list of hosts.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import sys
import time
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, ReadTimeoutError

ENDPOINT = os.environ["ENDPOINT_NAME"]
# Bytes that an endpoint takes.
PAYLOAD = 6_291_456
# Three tries, with growing pauses after throttling and broken connections; the template's Timeout is for all of them.
TRIES, CONNECT, READ = 3, 2, 18
_CONFIG = Config(connect_timeout=CONNECT, read_timeout=READ, retries={"mode": "standard", "total_max_attempts": TRIES})
# Made once for all calls of an instance; AWS_ENDPOINT_URL_SAGEMAKER_RUNTIME changes its address.
_runtime = boto3.client("sagemaker-runtime", config=_CONFIG)


class Refused(Exception):
    """A request that the endpoint does not see."""

    def __init__(self, status: int, kind: str, message: str) -> None:
        super().__init__(message)
        self.status, self.kind = status, kind


def handler(event: dict[str, Any], context: Any) -> dict[str, Any]:
    """Answer one event with `statusCode`, `headers` and `body`, and log one line of JSON, without picture or URL."""
    began = time.monotonic()
    line: dict[str, Any] = {"request": context.aws_request_id, "endpoint": ENDPOINT}
    try:
        body, kind = _picture(event)
        line |= {"source": "url" if kind == "application/json" else "bytes", "bytes": len(body)}
        answer = _runtime.invoke_endpoint(EndpointName=ENDPOINT, Body=body, ContentType=kind, Accept="application/json")
        status, text = 200, answer["Body"].read().decode()
        line["tries"] = answer["ResponseMetadata"]["RetryAttempts"] + 1
    except ClientError as error:
        status, text = _failure(error)
        about = error.response.get("ResponseMetadata", {})
        line |= {"error": error.response["Error"]["Code"], "tries": about.get("RetryAttempts", 0) + 1}
    except BotoCoreError as error:
        line["error"] = type(error).__name__
        late = isinstance(error, ReadTimeoutError)
        status, text = _error(
            *((504, "DeadlineExceeded") if late else (502, "BadGateway")), "the endpoint did not answer"
        )
    except Refused as error:
        line["error"] = error.kind
        status, text = _error(error.status, error.kind, str(error))
    line |= {"status": status, "ms": round(1000 * (time.monotonic() - began))}
    sys.stdout.write(json.dumps(line) + "\n")
    headers = {"Content-Type": "application/json", "X-Request-Id": context.aws_request_id}
    return {
        "statusCode": status,
        "headers": headers | ({"Retry-After": "1"} if status in (429, 503) else {}),
        "body": text,
    }


def _picture(event: dict[str, Any]) -> tuple[bytes, str]:
    """Return the body for the endpoint and its type."""
    values: Any = event
    if "body" in event:
        body = _decoded(event["body"]) if event.get("isBase64Encoded") else (event["body"] or "").encode()
        if not body.lstrip().startswith(b"{"):
            return _checked(body), "application/octet-stream"
        try:
            values = json.loads(body)
        except ValueError as error:
            raise Refused(400, "BadEncoding", f"the body is no JSON ({error})") from error
    if isinstance(values.get("url"), str):
        return _checked(json.dumps({"url": values["url"]}).encode()), "application/json"
    if isinstance(values.get("data"), str):
        return _checked(_decoded(values["data"])), "application/octet-stream"
    raise Refused(
        400, "BadEncoding", 'the event has no picture; allowed: {"url": "https://..."} or {"data": "<base64>"}'
    )


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Refused(400, "BadEncoding", f"the data is no base64 ({error})") from error


def _checked(body: bytes) -> bytes:
    if not body:
        raise Refused(400, "EmptyBody", "the event carries no picture")
    if len(body) > PAYLOAD:
        raise Refused(413, "TooManyBytes", f"the picture is {len(body)} bytes; the endpoint takes {PAYLOAD}")
    return body


def _failure(error: ClientError) -> tuple[int, str]:
    """Return the container's own answer where there is one, else an error in its form."""
    response: dict[str, Any] = error.response
    if "OriginalStatusCode" in response:
        return response["OriginalStatusCode"], response.get("OriginalMessage", "")
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 500)
    if "Throttl" in response["Error"]["Code"] or status == 429:
        return _error(429, "TooManyRequests", "AWS has no room for this request; try again after Retry-After seconds")
    if status == 503:
        return _error(503, "NotReady", "the endpoint is not ready; try again after Retry-After seconds")
    return _error(502, "BadGateway", f"the endpoint refused the call ({response['Error']['Code']})")


def _error(status: int, kind: str, message: str) -> tuple[int, str]:
    return status, json.dumps({"code": status, "type": kind, "message": message})
