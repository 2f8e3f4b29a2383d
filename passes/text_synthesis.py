"""Calibration text from a model alone: its own where it writes any, else random tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from octavo.ir.errors import UsageError
from octavo.ir.synthetic import Synthetic
from octavo.ir.vocabulary import Vocabulary
from octavo.passes.last_logits import last_logits
from octavo.passes.own_text import OwnText, empty_feed, is_causal, text_logits
from octavo.passes.token_feeds import TokenFeeds

if TYPE_CHECKING:
    from octavo.passes.base import PassContext
    from octavo.passes.input_laws import InputLaw
    from octavo.passes.synthesis import Synthesis
    from octavo.passes.token_feeds import Feed, Run
    from octavo.passes.token_inputs import TokenInputs

_INFILL_ROUNDS = 4
_GROUPS = 2
_WITHOUT_TOKENIZER = "no tokenizer: all tokens are alike, and no text begins or ends with one"


@final
@dataclass(frozen=True)
class TextSynthesis:
    """Texts for one model. Raises UsageError for inputs that token ids do not fill."""

    how: Synthesis
    inputs: TokenInputs
    ctx: PassContext

    def run(self) -> Synthetic:
        """Two independent groups: a decoder's own text, rewritten or random tokens otherwise."""
        if unknown := self.inputs.unknown():
            message = f"input '{unknown[0]}' is read beside token ids, and nothing tells its range"
            given = ", ".join(self.inputs.roles)
            hint = f"give --calibration, or --input for each of {given}"
            raise UsageError(message, hint=hint)
        vocabulary = self._vocabulary()
        feeds = TokenFeeds(self.inputs, vocabulary, self.how.length, self.how.prior)
        run: Run = self.ctx.evaluator.load(self.inputs.model)
        rng = self.ctx.rng("synthesis causal")
        writes = text_logits(self.inputs, run(empty_feed(self.inputs, feeds.words[:8])))
        causal = writes and is_causal(self.inputs, run, feeds.words, rng)
        if causal:
            # Another session takes its place.
            del run
            return self._written(feeds)
        return self._random(feeds, run if writes and vocabulary.mask is not None else None)

    def _vocabulary(self) -> Vocabulary:
        law: InputLaw | None = self.how.laws.get(self.inputs.ids)
        if law is not None and law.kind == "ids":
            below = frozenset(range(int(law.first)))
            return Vocabulary(min(int(law.second) + 1, self.inputs.rows), special=below)
        known = self.how.vocabulary
        where = self.inputs.model.source.name
        return known.fitted(self.inputs.rows, where) if known else Vocabulary(self.inputs.rows)

    def _notes(self) -> tuple[str, ...]:
        known = self.how.vocabulary is not None or self.inputs.ids in self.how.laws
        return () if known else (_WITHOUT_TOKENIZER,)

    def _random(self, tokens: TokenFeeds, run: Run | None) -> Synthetic:
        feeds: list[Feed] = []
        groups: list[int] = []
        for group in range(_GROUPS):
            rng = self.ctx.rng(f"synthesis {group}")
            made = list(tokens.draw(-(-self.how.samples // _GROUPS), rng))
            if run is not None:
                made = [tokens.infilled(feed, run, _INFILL_ROUNDS, rng) for feed in made]
            feeds += made
            groups += [group] * len(made)
            self.ctx.progress("synthesize", group + 1, _GROUPS)
        return Synthetic(tuple(feeds), "sampled-text", tuple(groups), notes=self._notes())

    def _written(self, tokens: TokenFeeds) -> Synthetic:
        """Both groups are written at the same time."""
        begin, fixed = tokens.vocabulary.begin, self.inputs.fixed_length
        model = self.inputs.model if fixed else last_logits(self.inputs.model, self.ctx)
        run: Run = self.ctx.evaluator.load(model)
        own = OwnText(self.inputs, tokens.words, begin, self.how.length, run)
        count, tokens_of = -(-self.how.samples // _GROUPS), [0] * _GROUPS

        def write(group: int) -> tuple[list[Feed], bool]:
            def report(done: int, total: int) -> None:
                tokens_of[group] = done
                self.ctx.progress("synthesize", sum(tokens_of), _GROUPS * total)

            rng = self.ctx.rng(f"synthesis {group}")
            return own.write(count, rng, self.how.seconds, report)

        written = list(self.ctx.executor.map(write, range(_GROUPS)))
        feeds = [feed for made, _ in written for feed in made]
        groups = tuple(at for at, (made, _) in enumerate(written) for _ in made)
        texts = sum(len(feed[self.inputs.ids]) for feed in feeds)
        late = any(cut for _, cut in written)
        cut_note = (f"the clock ended the writing after {texts} texts",) if late else ()
        notes = (*self._notes(), *cut_note)
        return Synthetic(tuple(feeds), "generated-text", groups, notes=notes)
