"""FastAPI on Uvicorn, as their tutorials have it: an uploaded file, a plain function, worker processes, no batches."""

from __future__ import annotations

from typing import Annotated

import classifier
from fastapi import FastAPI, File

app = FastAPI()
model = classifier.load()


@app.post("/predict")
def predict(file: Annotated[bytes, File()]) -> dict[str, float]:
    """Classify one picture in a thread of FastAPI's pool."""
    return model.predict([model.decode(file)])[0]
