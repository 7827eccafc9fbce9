"""Which reproductions are there? One line for each."""

from __future__ import annotations

from depthscope.app.study.reproductions import (
    answer,
    connections,
    figure_8,
    initialisation,
    rescue,
    stream_collapse,
)

STUDIES = {
    study.name: study
    for study in (
        answer.STUDY,
        connections.STUDY,
        initialisation.STUDY,
        stream_collapse.STUDY,
        rescue.STUDY,
        figure_8.STUDY,
    )
}
"""Every study, by the word of the command line."""
