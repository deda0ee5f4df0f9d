"""Where the load goes: a full address, or a server's root and its model; asked once before any load."""

from __future__ import annotations

from urllib.parse import quote, urlsplit

from beeline.errors import BeelineError
from bench.load.plan import Plan, content_type
from serve.client import InferenceClient

# Answers that no other picture would change.
_WRONG_ADDRESS = (401, 403, 404, 405)


def resolve(url: str, model: str | None = None) -> str:
    """Return the full address of predictions.

    Args:
        url: that address already, or a server's root.
        model: the name at a root; its only model by default, as its catalog lists it.

    Raises:
        BeelineError: when a root serves several models and none is named. Undetermined: when nothing answers.
    """
    parts = urlsplit(url)
    if parts.path.strip("/"):
        if model is not None and parts.path.rstrip("/").rpartition("/predictions/")[2].partition("/")[0] != model:
            raise BeelineError(f"the URL is {url} and --model is {model!r}; give the server's root with --model")
        return url
    root = url.rstrip("/")
    return f"{root}/predictions/{quote(model or _only(root))}"


def _only(root: str) -> str:
    with InferenceClient(root, timeout=30) as client:
        served = client.served()
    if served is None:
        raise BeelineError(f"{root} has no catalog of its models; add --model NAME")
    if len(served) != 1:
        raise BeelineError(f"{root} serves {', '.join(served) or 'nothing'}; add --model NAME")
    return served[0]


def answer_bytes(plan: Plan) -> int:
    """Send a plan's first picture and return the size of the answer, head and body.

    Raises:
        BeelineError: when the address is wrong. Undetermined: when nothing answers.
    """
    headers = {"Content-Type": content_type(plan.pictures.names[0]), **plan.headers}
    root = f"{plan.parts.scheme}://{plan.parts.netloc}"
    with InferenceClient(root, timeout=plan.deadline, patience=0) as client:
        answer = client.request("POST", plan.path, data=plan.pictures.bodies[0], headers=headers)
    if answer.status_code in _WRONG_ADDRESS:
        said = " ".join(answer.text.split())[:200]
        raise BeelineError(f"{plan.url} answers {answer.status_code} ({said}); give another address, or --model")
    head = sum(len(name) + len(value) + 4 for name, value in answer.headers.items())
    return head + len(answer.content)
