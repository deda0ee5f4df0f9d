"""FastAPI's tutorial on Uvicorn: an uploaded file, a plain function, a worker a core, no batches."""

from typing import Annotated

import classifier
from fastapi import FastAPI, File

app = FastAPI()
model = classifier.load()


@app.post("/predict")
def predict(file: Annotated[bytes, File()]) -> dict[str, float]:
    """Classify one picture in a thread of FastAPI's pool."""
    return model.predict([model.decode(file)])[0]
