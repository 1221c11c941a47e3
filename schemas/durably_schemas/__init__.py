"""The wire contract of durably: records, their Avro schemas, the codec, and the catalogue of topics.

Depends on nothing else of the project, so that a producer or consumer of the raw topics can use it alone.
"""

from durably_schemas.catalogue import Catalogue, Topic
from durably_schemas.codec import Codec, CodecError

__all__ = ["Catalogue", "Codec", "CodecError", "Topic"]
