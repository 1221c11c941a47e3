"""Health: of the process and its broker, for whoever watches it and without a token; and of the whole installation."""

from __future__ import annotations

import asyncio
from typing import Annotated

from durably.client.liveness import round_trips
from durably.errors import ConfigurationError
from fastapi import APIRouter, Query

from durably_connectors.http import models
from durably_connectors.http.gateway import GatewayOf, Json
from durably_connectors.http.security import GuardedRoute

router = APIRouter(tags=["health"])
installation = APIRouter(tags=["health"], route_class=GuardedRoute)
"""What asks a question of every processor, and so belongs to the API."""


@router.get("/health", response_model=models.Health)
@router.head("/health", include_in_schema=False)
async def health() -> Json:
    """The process answers."""
    return Json({"healthy": True})


@router.get(
    "/ready",
    response_model=models.Health,
    responses={503: {"model": models.Health, "description": "The broker does not answer, or runs are still read."}},
)
@router.head("/ready", include_in_schema=False)
async def ready(gateway: GatewayOf) -> Json:
    """The broker answers, and the list of runs is complete."""
    try:
        projection = gateway.projection
        problem = await gateway.broker_problem() or projection.problem
    except ConfigurationError as e:
        problem = str(e)
    else:
        if problem is None and not projection.is_ready:
            problem = "the list of runs is still being read"
    return Json({"healthy": problem is None, "problem": problem}, 200 if problem is None else 503)


@installation.get(
    "/processors",
    response_model=models.Processors,
    responses={503: {"model": models.Processors, "description": "Nobody owns one of the partitions."}},
)
async def processors(
    gateway: GatewayOf,
    timeout: Annotated[float, Query(gt=0, le=30, description="Seconds for an answer.")] = 10,  # noqa: ASYNC109 - of the query
) -> Json:
    """Asks the owner of every partition, and says how long each answer took."""
    trips = await asyncio.to_thread(round_trips, gateway.connection, timeout)
    healthy = all(trip.latency_ms is not None for trip in trips)
    report = {"healthy": healthy, "partitions": [trip._asdict() for trip in trips]}
    return Json(report, 200 if healthy else 503)
