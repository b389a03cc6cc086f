"""The bundled teacher draws what it is asked for."""

from __future__ import annotations

import numpy as np

from fewstep.drawing import load_artist
from fewstep.settings import TEACHER_SAMPLING
from fewstep.world import emoji8, location
from fewstep.world.measures import agreement
from fewstep.world.students import students_omega

ASKED = 48


def test_the_teacher_draws_what_it_is_asked_for() -> None:
    """A caption fits its own picture better than the next caption does, by far."""
    records = emoji8.load_records("train")
    captions = [emoji8.name_with_style(records[i]) for i in range(0, len(records), len(records) // ASKED)][:ASKED]
    artist = load_artist(location.root() / "teacher")
    sampling = TEACHER_SAMPLING.model_copy(update={"steps": 20, "omega": students_omega()})
    pictures = artist.draw(captions, range(ASKED), sampling)
    fits, strangers = (agreement().features(pictures, asked) for asked in (captions, captions[1:] + captions[:1]))
    gains = fits - strangers
    assert gains.mean() > 8 * gains.std(ddof=1) / np.sqrt(ASKED)
    assert np.median(pictures[:, 0, 0]) > 250, "emoji stand on white"
