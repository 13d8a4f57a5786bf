"""How often: each org's requests in each minute, and each agent's, counted by one atomic script on Redis.

The minute is that of Redis' clock, so that all gates count into the same one whatever their own clocks say. A request
that is refused is not counted.
"""

from __future__ import annotations

import hashlib
import re
from functools import lru_cache
from typing import Any

import structlog

from extproc.gate import metrics
from extproc.gate.verdict import Quota
from extproc.redis.link import LinkProblem, RedisLink, Refusal, encode_command

__all__ = ["RateLimiter"]

_SCRIPT = b"""
local now = tonumber(redis.call('TIME')[1])
local minute = math.floor(now / 60)
local reset = (minute + 1) * 60
local own = redis.call('GET', KEYS[1])
local limits = {tonumber(ARGV[2]), tonumber(ARGV[4])}
if own and string.match(own, '^%d+$') then limits[1] = tonumber(own) end
local scopes = {ARGV[1], ARGV[1] .. ':' .. ARGV[3]}
local keys, counts = {}, {}
local function answer(within, limit, remaining)
  return string.format('%.0f %.0f %.0f %.0f %.0f', within, limit, remaining, reset, reset - now)
end
for i = 1, 2 do
  if limits[i] > 0 then
    keys[i] = 'ratelimit:' .. scopes[i] .. ':rpm:' .. string.format('%d', minute)
    counts[i] = tonumber(redis.call('GET', keys[i]) or '0')
    if counts[i] >= limits[i] then return answer(0, limits[i], 0) end
  end
end
for i = 1, 2 do
  if keys[i] and redis.call('INCR', keys[i]) == 1 then redis.call('EXPIRE', keys[i], 90) end
end
if keys[1] then return answer(1, limits[1], limits[1] - counts[1] - 1) end
if keys[2] then return answer(1, limits[2], limits[2] - counts[2] - 1) end
return answer(1, 0, 0)
"""
"""KEYS: the org's own limit. ARGV: org, its limit, agent, its limit; 0 is no limit. The counters' keys depend on the
server's clock and so are made here, which is why a cluster cannot take this.

Returns one string, which is cheaper to read than an array: within, limit, remaining, reset, seconds until then; the
org's numbers, or the agent's where it has the only limit or is the one that refuses. A limit of 0: none at all."""

_SHA = hashlib.sha1(_SCRIPT).hexdigest()  # noqa: S324 - the name that Redis gives a script
_MOST = 2**53
"""Lua counts in floating point."""
_LONGEST_REPLY = 100
"""Five numbers."""
_KEPT_COMMANDS = 4096
"""One for each agent, 250 bytes."""
_WORD = re.compile(r"[A-Z]{2,20}\b")

_log = structlog.get_logger("extproc.gate")


class RateLimiter:
    """`count` each request that is otherwise allowed."""

    def __init__(self, link: RedisLink, rpm: int, agent_rpm: int) -> None:
        """0: any number."""
        self._link = link
        self._rpm = rpm
        self._agent_rpm = agent_rpm
        self._is_up: bool | None = None

    async def count(self, org_id: str, agent_id: str) -> Quota | LinkProblem | None:
        """None: this org has no limit. LinkProblem: nobody could count, and it is not known whether Redis did."""
        reply = await self._link.ask(_command("EVALSHA", _SHA, org_id, self._rpm, agent_id, self._agent_rpm))
        if isinstance(reply, Refusal) and reply.startswith("NOSCRIPT"):
            whole = _command("EVAL", _SCRIPT, org_id, self._rpm, agent_id, self._agent_rpm)
            reply = await self._link.ask(whole)
        quota = _read_quota(reply)
        self._say(quota, reply)
        return quota if isinstance(quota, LinkProblem) or quota.limit else None

    def _say(self, quota: Quota | LinkProblem, reply: object) -> None:
        """A line when it changes, not one for each request."""
        is_up = not isinstance(quota, LinkProblem)
        if is_up == self._is_up:
            return
        self._is_up = is_up
        metrics.LIMITER_UP.set(is_up)
        if is_up:
            _log.info("requests are counted")
        else:
            _log.warning(
                "requests cannot be counted; IBEX_RATE_LIMIT_ON_ERROR says what happens to them",
                problem=_problem(reply),
            )


@lru_cache(_KEPT_COMMANDS)
def _command(name: str, script: str | bytes, org_id: str, rpm: int, agent_id: str, agent_rpm: int) -> bytes:
    key = f"ratelimit:{org_id}:limit"
    return encode_command(name, script, "1", key, org_id, str(rpm), agent_id, str(agent_rpm))


def _read_quota(reply: Any) -> Quota | LinkProblem:
    if isinstance(reply, LinkProblem):
        return reply
    if not isinstance(reply, bytes) or len(reply) > _LONGEST_REPLY:
        return LinkProblem.DOWN
    try:
        within, limit, remaining, reset, retry_after = map(int, reply.split(b" "))
    except ValueError:
        return LinkProblem.DOWN
    if not 0 <= limit <= _MOST or not 0 <= reset <= _MOST:
        return LinkProblem.DOWN
    return Quota(within == 1, limit, max(0, min(limit, remaining)), reset, max(1, min(60, retry_after)))


def _problem(reply: object) -> str:
    """Of a refusal, the first word only: the rest may hold parts of the command."""
    match reply:
        case LinkProblem():
            return reply.name.lower()
        case Refusal():
            word = _WORD.match(reply)
            return word.group() if word else "refused"
        case _:
            return "an answer of an unknown form"
