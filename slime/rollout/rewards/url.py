"""Rewards from an HTTP endpoint, reward.url.

POST {"prompt": ..., "response": "...", "label": ..., "source": "...", "metadata": {...}}  ->  a number, or {"score": ..., ...}
"""

import aiohttp

from slime.config import RewardConfig
from slime.rollout.rewards.judgement import late
from slime.rollout.rewards.verdict import Verdict, read_verdict
from slime.types import Sample

TOGETHER = 512  # requests at once


class UrlJudge:
    """Asks the endpoint once for each sample. Make it where an event loop runs."""

    def __init__(self, cfg: RewardConfig) -> None:
        assert cfg.url is not None
        self._url, self._timeout_s = cfg.url, cfg.timeout_s
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=TOGETHER), timeout=aiohttp.ClientTimeout(total=cfg.timeout_s)
        )

    async def judge(self, samples: list[Sample]) -> list[Verdict]:
        """The verdict of one sample; whatever goes wrong on the way is its error."""
        (sample,) = samples
        question = {
            "prompt": sample.prompt,
            "response": sample.text,
            "label": sample.label,
            "source": sample.source,
            "metadata": sample.metadata,
        }
        try:
            async with self._session.post(self._url, json=question) as response:
                if response.status != 200:
                    return self._error(f"answered {response.status}: {(await response.text())[:200]}")
                return [read_verdict(await response.json(content_type=None))]
        except TimeoutError:
            return late(self._timeout_s, 1)
        except (aiohttp.ClientError, ValueError, TypeError) as error:  # TypeError: metadata that JSON does not know
            return self._error(f"failed: {error or type(error).__name__}")

    async def close(self) -> None:
        await self._session.close()

    def _error(self, what: str) -> list[Verdict]:
        return [Verdict(None, f"reward.url={self._url} {what}")]
