"""What may be done to a module's output, as pure functions: the one abstraction that a Controller knows.

An `Intervention` says where it acts (sites, positions), with what amount, and what it does there. All interventions of one
site are applied together by `edit_site`.
"""

from steerkit.intervention.amounts import Amounts as Amounts
from steerkit.intervention.edits import LinearEdit as LinearEdit
from steerkit.intervention.edits import SiteEdit as SiteEdit
from steerkit.intervention.edits import edit_site as edit_site
from steerkit.intervention.kinds import Addition as Addition
from steerkit.intervention.kinds import Constraint as Constraint
from steerkit.intervention.kinds import Erasure as Erasure
from steerkit.intervention.kinds import Intervention as Intervention
from steerkit.intervention.kinds import ResidualIntervention as ResidualIntervention
from steerkit.intervention.kinds import Site as Site
from steerkit.intervention.kinds import WeightAddition as WeightAddition
