"""The OpenAPI document of the routes that are on, which the gateway answers to `OPTIONS /` and `/api-description`."""

from __future__ import annotations

import re
from typing import Any

from serve.gateway.settings import Settings

_PICTURE = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
_JSON: dict[str, Any] = {"application/json": {"schema": {"type": "object"}}}
_RESPONSES = {
    "200": {"description": "The answer"},
    "default": {"description": "An error: code, type and message", "content": _JSON},
}
_PLAIN = (
    ("GET", "/ping", "Readiness of the models: 200, or 503 with the reason"),
    ("POST PUT", "/predictions/{model}", "Classify one picture with the default version of a model"),
    ("POST PUT", "/predictions/{model}/{version}", "Classify one picture with one version of a model"),
    ("GET", "/catalog.json", "The models, their samples, and the limits"),
    ("GET", "/catalog/{model}/{version}.json", "The card of a model"),
    ("GET", "/samples/{model}/{version}/{file}", "A sample picture"),
    *(("GET", path, "The page") for path in ("/", "/index.html", "/style.css", "/icon.svg", "/scripts/{script}.js")),
    ("OPTIONS", "/", "This document"),
    ("GET OPTIONS", "/api-description", "This document"),
)
_SERVER = (
    ("POST PUT", "/{model}/predict", "Classify one picture: an older name of /predictions/{model}"),
    ("POST PUT", "/models/{model}/invoke", "Classify one picture: another name of /predictions/{model}"),
)
_INVOCATIONS = (("POST", "/invocations", "Classify one picture, as SageMaker asks"),)
_KSERVE = (
    ("GET", "/v1/models", "The names of the models"),
    ("GET", "/v1/models/{model}", "Readiness of a model"),
    ("POST", "/v1/models/{model}:predict", "Classify pictures: instances with b64"),
    ("GET", "/v2", "The server"),
    ("GET", "/v2/health/live", "Whether the gateway runs"),
    ("GET", "/v2/health/ready", "Whether a model is ready"),
    *(
        route
        for path in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}")
        for route in (
            ("GET", path, "The inputs and outputs of a model"),
            ("GET", f"{path}/ready", "Readiness of a model"),
            ("POST", f"{path}/infer", "Classify pictures: one tensor of BYTES"),
        )
    ),
)


def describe(settings: Settings) -> dict[str, Any]:
    """Return the document for a gateway with these settings."""
    paths: dict[str, dict[str, Any]] = {}
    routes = [*_PLAIN, *(_SERVER if settings.server_routes else ()), *(_KSERVE if settings.kserve else ())]
    routes += _INVOCATIONS if settings.invocations else ()
    for methods, path, summary in routes:
        names = re.findall(r"{(\w+)}", path)
        named = [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names]
        for method in methods.lower().split():
            operation: dict[str, Any] = {"summary": summary, "responses": _RESPONSES}
            if method in ("post", "put"):
                taken = _JSON if path.startswith(("/v1", "/v2")) else {**_PICTURE, **_JSON}
                operation["requestBody"] = {"required": True, "content": taken}
            paths.setdefault(path, {"parameters": named} if named else {})[method] = operation
    return {"openapi": "3.0.3", "info": {"title": "Beeline", "version": "0.1.0"}, "paths": paths}
