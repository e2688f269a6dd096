"""Measuring what an edit did."""

from hf_alphaedit.evaluation.damage import Reference as Reference
from hf_alphaedit.evaluation.damage import make_reference as make_reference
from hf_alphaedit.evaluation.generation import generate as generate
from hf_alphaedit.evaluation.protocol import evaluate as evaluate
from hf_alphaedit.evaluation.report import Estimate as Estimate
from hf_alphaedit.evaluation.report import EvaluationReport as EvaluationReport
from hf_alphaedit.evaluation.scoring import score as score
