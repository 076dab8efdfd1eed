from rtfocus.api import Optics as Optics
from rtfocus.api import acquire as acquire
from rtfocus.api import classify as classify
from rtfocus.api import fit_psf as fit_psf
from rtfocus.api import process as process
from rtfocus.api import restore as restore
from rtfocus.api import run as run
from rtfocus.config import Config as Config
from rtfocus.config import load_config as load_config
from rtfocus.errors import ConfigError as ConfigError
from rtfocus.errors import EngineError as EngineError
from rtfocus.errors import IncompleteError as IncompleteError
from rtfocus.errors import InputError as InputError
from rtfocus.errors import MicroscopeError as MicroscopeError
from rtfocus.errors import OutputError as OutputError
from rtfocus.errors import RtfocusError as RtfocusError
from rtfocus.errors import TransportError as TransportError
from rtfocus.errors import WriterError as WriterError
from rtfocus.focusing import focus as focus
from rtfocus.frame import DefocusMap as DefocusMap
from rtfocus.frame import Estimate as Estimate
from rtfocus.offline import ImageProcessor as ImageProcessor
from rtfocus.runs import Run as Run
from rtfocus.runs import open_run as open_run
from rtfocus.streaming import estimates as estimates
from rtfocus.streaming import stream as stream

__version__: str
