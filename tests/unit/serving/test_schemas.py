"""What the API's document says of requests."""

from __future__ import annotations

import base64
import io

import pytest
from PIL import Image
from pydantic import BaseModel

pytest.importorskip("fastapi")
from limner.serving.a1111_api import Img2Img, Txt2Img
from limner.serving.openai_api import EditRequest, GenerationRequest
from limner.serving.schemas import PIXEL, JobRequest


@pytest.mark.parametrize("request_", [JobRequest, GenerationRequest, Txt2Img, Img2Img])
def test_an_example_is_a_request(request_: type[BaseModel]) -> None:
    [example] = request_.model_json_schema()["examples"]
    request_.model_validate(example)


def test_a_form_s_example_has_all_that_it_wants() -> None:
    schema = EditRequest.model_json_schema()
    assert set(schema["required"]) <= set(schema["examples"][0])


def test_the_pixel_is_a_picture() -> None:
    assert Image.open(io.BytesIO(base64.b64decode(PIXEL))).size == (1, 1)
