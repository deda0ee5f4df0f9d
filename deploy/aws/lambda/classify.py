"""The Lambda function before the SageMaker endpoint: a picture by URL or in base64 in, the endpoint's answer out.

The event is `{"url": "https://..."}` or `{"data": "<base64>"}`, or what API Gateway and function URLs make of a request
with that, or with a picture, as its body. The endpoint's container fetches the URL, by its own list of hosts.
"""

from __future__ import annotations

import base64
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
    """An answer that is not the container's: its status, its type and a sentence."""

    def __init__(self, status: int, kind: str, sentence: str) -> None:
        super().__init__(sentence)
        self.status, self.kind = status, kind


def handler(event: Any, context: Any) -> dict[str, Any]:
    """Answer one event with `statusCode`, `headers` and `body`, and log one line of JSON, without picture or URL."""
    began = time.monotonic()
    line: dict[str, Any] = {"request": context.aws_request_id, "endpoint": ENDPOINT}
    try:
        status, text = _invoke(*_picture(event), line)
    except Refused as error:
        line["error"], status = error.kind, error.status
        text = json.dumps({"code": status, "type": error.kind, "message": str(error)})
    line |= {"status": status, "ms": round(1000 * (time.monotonic() - began))}
    sys.stdout.write(json.dumps(line) + "\n")
    headers = {"Content-Type": "application/json", "X-Request-Id": context.aws_request_id}
    headers |= {"Retry-After": "1"} if status in (429, 503) else {}
    return {"statusCode": status, "headers": headers, "body": text}


def _invoke(body: bytes, kind: str, line: dict[str, Any]) -> tuple[int, str]:
    """Return the container's status and answer, and add to the log's line."""
    line |= {"source": "url" if kind == "application/json" else "bytes", "bytes": len(body)}
    try:
        answer = _runtime.invoke_endpoint(EndpointName=ENDPOINT, Body=body, ContentType=kind, Accept="application/json")
        line["tries"] = answer["ResponseMetadata"]["RetryAttempts"] + 1
        return 200, answer["Body"].read().decode()
    except ClientError as error:
        response: dict[str, Any] = error.response
        name, about = response["Error"]["Code"], response["ResponseMetadata"]
        line |= {"aws": name, "tries": about["RetryAttempts"] + 1}
        if "OriginalStatusCode" in response:
            return response["OriginalStatusCode"], response.get("OriginalMessage", "")
        if "Throttl" in name or about["HTTPStatusCode"] == 429:
            raise Refused(429, "TooManyRequests", "AWS takes no more requests; try again after a second") from error
        if about["HTTPStatusCode"] == 503:
            raise Refused(503, "NotReady", "the endpoint is not ready; try again after a second") from error
        raise Refused(
            502, "BadGateway", f"the endpoint refused the call ({name}); the function's log says more"
        ) from error
    except ReadTimeoutError as error:
        raise Refused(504, "DeadlineExceeded", f"there was no answer in {TRIES} tries of {READ} seconds") from error
    except BotoCoreError as error:
        raise Refused(502, "BadGateway", f"the endpoint cannot be reached ({type(error).__name__})") from error


def _picture(event: Any) -> tuple[bytes, str]:
    """Return the body for the endpoint and its type."""
    values, body, kind = event, b"", "application/octet-stream"
    try:
        if "body" in event:
            text = event["body"] or ""
            body = base64.b64decode(text, validate=True) if event.get("isBase64Encoded") else text.encode()
            values = json.loads(body) if body.lstrip()[:1] == b"{" else {}
        if "url" in values:
            body, kind = json.dumps({"url": values["url"]}).encode(), "application/json"
        elif "data" in values:
            body = base64.b64decode(values["data"], validate=True)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        allowed = 'allowed: {"url": "https://..."}, {"data": "<base64>"}, or a request with one of them as its body'
        raise Refused(400, "BadEncoding", f"the event holds no picture ({error}); {allowed}") from error
    if not body:
        raise Refused(400, "EmptyBody", "the event holds no picture; send a URL, or the picture in base64")
    if len(body) > PAYLOAD:
        raise Refused(413, "TooManyBytes", f"the picture is {len(body)} bytes; the endpoint takes {PAYLOAD}")
    return body, kind
