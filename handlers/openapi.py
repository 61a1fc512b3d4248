"""A table of routes, and the OpenAPI 3.1 document that it makes.

A route says everything once: Tornado's URL, what its handler reads of a request,
and what the document promises come from the same row.  Pure but for the handler
classes that the rows name.  PROTOCOL 17.4.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import msgspec
import tornado.web

from server import __version__

Schema = Mapping[str, Any]


class Parameter(msgspec.Struct, frozen=True):
    """One parameter of a request.

    ``read`` makes a value of its text, or raises ``ValueError`` with what was
    expected.  ``several`` may be given more than once, and so up to that often.
    """

    name: str
    place: Literal["path", "query", "header"]
    about: str
    schema: Schema
    read: Callable[[str], Any] = str
    several: int = 0
    required: bool = False
    example: str = ""

    def document(self) -> dict[str, Any]:
        """Its Parameter Object."""
        schema: dict[str, Any] = dict(self.schema)
        if self.several:
            schema = {"type": "array", "items": schema, "minItems": int(self.required), "maxItems": self.several}
        document: dict[str, Any] = {"name": self.name, "in": self.place, "description": self.about, "schema": schema}
        if self.several:
            document |= {"style": "form", "explode": True}
        if self.required or self.place == "path":
            document["required"] = True
        if self.example:
            document["example"] = [self.example] if self.several else self.example
        return document


class Answer(msgspec.Struct, frozen=True):
    """One kind of answer: its content type and its schema's name, both ``""`` for no body."""

    about: str
    content_type: str = ""
    schema: str = ""
    headers: tuple[str, ...] = ()

    def document(self, headers: Mapping[str, str]) -> dict[str, Any]:
        """Its Response Object; ``headers`` says what each header is."""
        document: dict[str, Any] = {"description": self.about}
        if self.headers:
            document["headers"] = {
                name: {"description": headers[name], "schema": {"type": "string"}} for name in self.headers
            }
        if self.content_type:
            schema = {"$ref": f"#/components/schemas/{self.schema}"} if self.schema else {"type": "string"}
            document["content"] = {self.content_type: {"schema": schema}}
        return document


class Operation(msgspec.Struct, frozen=True):
    """One method of a path; ``body`` is the name of the schema of what it takes, ``""`` for nothing."""

    method: str
    name: str
    about: str
    answers: Mapping[int, Answer]
    parameters: tuple[Parameter, ...] = ()
    body: str = ""
    token_in_query: bool = False
    public: bool = False


class Route(msgspec.Struct, frozen=True):
    """A path with ``{names}`` in it, and what is there."""

    path: str
    handler: type[tornado.web.RequestHandler]
    operations: tuple[Operation, ...]

    @property
    def pattern(self) -> str:
        """The path as Tornado matches it: a name stands for anything but a slash, percent-encoded."""
        parts = re.split(r"(\{\w+\})", self.path)
        return "".join("([^/]+)" if part.startswith("{") else re.escape(part) for part in parts)


def problem(about: str, *headers: str) -> Answer:
    """An answer that is a problem document (RFC 9457)."""
    return Answer(about, "application/problem+json", "Problem", headers)


def document(
    routes: Sequence[Route], schemas: Mapping[str, Schema], headers: Mapping[str, str], problems: Mapping[int, Answer]
) -> dict[str, Any]:
    """The OpenAPI document; ``problems`` are the answers that every operation may give."""
    paths: dict[str, Any] = {}
    for route in routes:
        paths[route.path] = {
            operation.method.lower(): _operation(operation, headers, problems) for operation in route.operations
        }
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Waterspout",
            "version": __version__,
            "summary": "Channels over HTTP: publish, read, wait, listen.",
            "license": {"name": "MIT", "identifier": "MIT"},
        },
        "servers": [{"url": "/"}],
        "paths": paths,
        "components": {
            "schemas": dict(schemas),
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer", "bearerFormat": "JWT"},
                "query": {"type": "apiKey", "in": "query", "name": "token"},
            },
        },
    }


def _operation(operation: Operation, headers: Mapping[str, str], problems: Mapping[int, Answer]) -> dict[str, Any]:
    answers = {**operation.answers, **({} if operation.public else problems)}
    document: dict[str, Any] = {
        "operationId": operation.name,
        "summary": operation.about,
        "responses": {str(status): answers[status].document(headers) for status in sorted(answers)},
    }
    if operation.parameters:
        document["parameters"] = [parameter.document() for parameter in operation.parameters]
    if operation.body:
        schema = {"$ref": f"#/components/schemas/{operation.body}"}
        document["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    if not operation.public:
        # Where anonymous users may come in, none is needed.
        document["security"] = [{}, {"bearer": []}, *([{"query": []}] if operation.token_in_query else [])]
    return document
