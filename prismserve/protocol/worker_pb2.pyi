from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Job(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    JOB_UNSPECIFIED: _ClassVar[Job]
    JOB_LOCAL: _ClassVar[Job]
    JOB_PREFILL: _ClassVar[Job]
    JOB_DECODE: _ClassVar[Job]
JOB_UNSPECIFIED: Job
JOB_LOCAL: Job
JOB_PREFILL: Job
JOB_DECODE: Job

class Scalar(_message.Message):
    __slots__ = ("text", "integer", "number", "flag")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    INTEGER_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    FLAG_FIELD_NUMBER: _ClassVar[int]
    text: str
    integer: int
    number: float
    flag: bool
    def __init__(self, text: _Optional[str] = ..., integer: _Optional[int] = ..., number: _Optional[float] = ..., flag: _Optional[bool] = ...) -> None: ...

class MethodSpec(_message.Message):
    __slots__ = ("name", "params")
    class ParamsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: Scalar
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[Scalar, _Mapping]] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    PARAMS_FIELD_NUMBER: _ClassVar[int]
    name: str
    params: _containers.MessageMap[str, Scalar]
    def __init__(self, name: _Optional[str] = ..., params: _Optional[_Mapping[str, Scalar]] = ...) -> None: ...

class CompressionPlan(_message.Message):
    __slots__ = ("visual", "wire", "preset", "prefill")
    VISUAL_FIELD_NUMBER: _ClassVar[int]
    WIRE_FIELD_NUMBER: _ClassVar[int]
    PRESET_FIELD_NUMBER: _ClassVar[int]
    PREFILL_FIELD_NUMBER: _ClassVar[int]
    visual: MethodSpec
    wire: MethodSpec
    preset: str
    prefill: MethodSpec
    def __init__(self, visual: _Optional[_Union[MethodSpec, _Mapping]] = ..., wire: _Optional[_Union[MethodSpec, _Mapping]] = ..., preset: _Optional[str] = ..., prefill: _Optional[_Union[MethodSpec, _Mapping]] = ...) -> None: ...

class Segment(_message.Message):
    __slots__ = ("token_ids", "is_media", "media_index", "key", "tokens", "raw_tokens", "position_span", "position_reach")
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    IS_MEDIA_FIELD_NUMBER: _ClassVar[int]
    MEDIA_INDEX_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    RAW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    POSITION_SPAN_FIELD_NUMBER: _ClassVar[int]
    POSITION_REACH_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    is_media: bool
    media_index: int
    key: bytes
    tokens: int
    raw_tokens: int
    position_span: int
    position_reach: int
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ..., is_media: _Optional[bool] = ..., media_index: _Optional[int] = ..., key: _Optional[bytes] = ..., tokens: _Optional[int] = ..., raw_tokens: _Optional[int] = ..., position_span: _Optional[int] = ..., position_reach: _Optional[int] = ...) -> None: ...

class FrameTimes(_message.Message):
    __slots__ = ("seconds", "rate")
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    RATE_FIELD_NUMBER: _ClassVar[int]
    seconds: _containers.RepeatedScalarFieldContainer[float]
    rate: float
    def __init__(self, seconds: _Optional[_Iterable[float]] = ..., rate: _Optional[float] = ...) -> None: ...

class MediaInput(_message.Message):
    __slots__ = ("data", "pixel_hash", "width_px", "height_px", "times")
    DATA_FIELD_NUMBER: _ClassVar[int]
    PIXEL_HASH_FIELD_NUMBER: _ClassVar[int]
    WIDTH_PX_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_PX_FIELD_NUMBER: _ClassVar[int]
    TIMES_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    pixel_hash: bytes
    width_px: int
    height_px: int
    times: FrameTimes
    def __init__(self, data: _Optional[bytes] = ..., pixel_hash: _Optional[bytes] = ..., width_px: _Optional[int] = ..., height_px: _Optional[int] = ..., times: _Optional[_Union[FrameTimes, _Mapping]] = ...) -> None: ...

class SamplingParams(_message.Message):
    __slots__ = ("max_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed", "stop", "stop_token_ids", "ignore_eos", "logit_bias", "logprobs", "constraint")
    class LogitBiasEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: float
        def __init__(self, key: _Optional[int] = ..., value: _Optional[float] = ...) -> None: ...
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MIN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    IGNORE_EOS_FIELD_NUMBER: _ClassVar[int]
    LOGIT_BIAS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    CONSTRAINT_FIELD_NUMBER: _ClassVar[int]
    max_tokens: int
    min_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    seed: int
    stop: _containers.RepeatedScalarFieldContainer[str]
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    ignore_eos: bool
    logit_bias: _containers.ScalarMap[int, float]
    logprobs: int
    constraint: Constraint
    def __init__(self, max_tokens: _Optional[int] = ..., min_tokens: _Optional[int] = ..., temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., top_k: _Optional[int] = ..., min_p: _Optional[float] = ..., repetition_penalty: _Optional[float] = ..., presence_penalty: _Optional[float] = ..., frequency_penalty: _Optional[float] = ..., seed: _Optional[int] = ..., stop: _Optional[_Iterable[str]] = ..., stop_token_ids: _Optional[_Iterable[int]] = ..., ignore_eos: _Optional[bool] = ..., logit_bias: _Optional[_Mapping[int, float]] = ..., logprobs: _Optional[int] = ..., constraint: _Optional[_Union[Constraint, _Mapping]] = ...) -> None: ...

class Constraint(_message.Message):
    __slots__ = ("kind", "text")
    KIND_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    kind: str
    text: str
    def __init__(self, kind: _Optional[str] = ..., text: _Optional[str] = ...) -> None: ...

class Request(_message.Message):
    __slots__ = ("request_id", "attempt", "namespace", "wire_namespace", "segments", "media", "sampling", "compression", "resume_token_ids", "priority", "timeout_s", "tenant", "cache_share", "scoring_token_ids")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    WIRE_NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    SEGMENTS_FIELD_NUMBER: _ClassVar[int]
    MEDIA_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    COMPRESSION_FIELD_NUMBER: _ClassVar[int]
    RESUME_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    CACHE_SHARE_FIELD_NUMBER: _ClassVar[int]
    SCORING_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    attempt: int
    namespace: bytes
    wire_namespace: bytes
    segments: _containers.RepeatedCompositeFieldContainer[Segment]
    media: _containers.RepeatedCompositeFieldContainer[MediaInput]
    sampling: SamplingParams
    compression: CompressionPlan
    resume_token_ids: _containers.RepeatedScalarFieldContainer[int]
    priority: int
    timeout_s: float
    tenant: str
    cache_share: float
    scoring_token_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., namespace: _Optional[bytes] = ..., wire_namespace: _Optional[bytes] = ..., segments: _Optional[_Iterable[_Union[Segment, _Mapping]]] = ..., media: _Optional[_Iterable[_Union[MediaInput, _Mapping]]] = ..., sampling: _Optional[_Union[SamplingParams, _Mapping]] = ..., compression: _Optional[_Union[CompressionPlan, _Mapping]] = ..., resume_token_ids: _Optional[_Iterable[int]] = ..., priority: _Optional[int] = ..., timeout_s: _Optional[float] = ..., tenant: _Optional[str] = ..., cache_share: _Optional[float] = ..., scoring_token_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class RouterMessage(_message.Message):
    __slots__ = ("hello", "submit", "cancel")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    SUBMIT_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    submit: Submit
    cancel: Cancel
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., submit: _Optional[_Union[Submit, _Mapping]] = ..., cancel: _Optional[_Union[Cancel, _Mapping]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("router_id",)
    ROUTER_ID_FIELD_NUMBER: _ClassVar[int]
    router_id: str
    def __init__(self, router_id: _Optional[str] = ...) -> None: ...

class Submit(_message.Message):
    __slots__ = ("request", "job", "target_worker", "target_epoch", "pull_from", "pull_blocks", "embedding_holders", "skip_restore")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    JOB_FIELD_NUMBER: _ClassVar[int]
    TARGET_WORKER_FIELD_NUMBER: _ClassVar[int]
    TARGET_EPOCH_FIELD_NUMBER: _ClassVar[int]
    PULL_FROM_FIELD_NUMBER: _ClassVar[int]
    PULL_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    EMBEDDING_HOLDERS_FIELD_NUMBER: _ClassVar[int]
    SKIP_RESTORE_FIELD_NUMBER: _ClassVar[int]
    request: Request
    job: Job
    target_worker: str
    target_epoch: int
    pull_from: str
    pull_blocks: int
    embedding_holders: _containers.RepeatedScalarFieldContainer[str]
    skip_restore: bool
    def __init__(self, request: _Optional[_Union[Request, _Mapping]] = ..., job: _Optional[_Union[Job, str]] = ..., target_worker: _Optional[str] = ..., target_epoch: _Optional[int] = ..., pull_from: _Optional[str] = ..., pull_blocks: _Optional[int] = ..., embedding_holders: _Optional[_Iterable[str]] = ..., skip_restore: _Optional[bool] = ...) -> None: ...

class Cancel(_message.Message):
    __slots__ = ("request_id", "attempt")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    attempt: int
    def __init__(self, request_id: _Optional[str] = ..., attempt: _Optional[int] = ...) -> None: ...

class WorkerMessage(_message.Message):
    __slots__ = ("welcome", "outputs", "stats")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    STATS_FIELD_NUMBER: _ClassVar[int]
    welcome: Welcome
    outputs: StepOutputs
    stats: Stats
    def __init__(self, welcome: _Optional[_Union[Welcome, _Mapping]] = ..., outputs: _Optional[_Union[StepOutputs, _Mapping]] = ..., stats: _Optional[_Union[Stats, _Mapping]] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("worker_id", "epoch")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    epoch: int
    def __init__(self, worker_id: _Optional[str] = ..., epoch: _Optional[int] = ...) -> None: ...

class TokenOutput(_message.Message):
    __slots__ = ("request_id", "attempt", "token_ids", "finish_reason", "error", "report", "logprobs")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    REPORT_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    attempt: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    finish_reason: str
    error: str
    report: PrefillReport
    logprobs: _containers.RepeatedCompositeFieldContainer[TokenLogprobs]
    def __init__(self, request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ..., finish_reason: _Optional[str] = ..., error: _Optional[str] = ..., report: _Optional[_Union[PrefillReport, _Mapping]] = ..., logprobs: _Optional[_Iterable[_Union[TokenLogprobs, _Mapping]]] = ...) -> None: ...

class TokenLogprobs(_message.Message):
    __slots__ = ("logprob", "top_token_ids", "top_logprobs")
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    TOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    logprob: float
    top_token_ids: _containers.RepeatedScalarFieldContainer[int]
    top_logprobs: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, logprob: _Optional[float] = ..., top_token_ids: _Optional[_Iterable[int]] = ..., top_logprobs: _Optional[_Iterable[float]] = ...) -> None: ...

class StepOutputs(_message.Message):
    __slots__ = ("outputs",)
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    outputs: _containers.RepeatedCompositeFieldContainer[TokenOutput]
    def __init__(self, outputs: _Optional[_Iterable[_Union[TokenOutput, _Mapping]]] = ...) -> None: ...

class PrefillReport(_message.Message):
    __slots__ = ("worker_id", "cached_tokens", "computed_tokens", "images", "images_cached", "encode_ms", "prefill_ms", "kv_bytes_raw", "kv_bytes_kept", "kv_bytes_sent", "transfer_ms", "transfer_exposed_ms", "transport", "visual_tokens_by_cut", "fetch_ms", "restored_tokens", "pulled_tokens")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMPUTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    IMAGES_CACHED_FIELD_NUMBER: _ClassVar[int]
    ENCODE_MS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_MS_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_RAW_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_KEPT_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_SENT_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_MS_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_EXPOSED_MS_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    VISUAL_TOKENS_BY_CUT_FIELD_NUMBER: _ClassVar[int]
    FETCH_MS_FIELD_NUMBER: _ClassVar[int]
    RESTORED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PULLED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    cached_tokens: int
    computed_tokens: int
    images: int
    images_cached: int
    encode_ms: float
    prefill_ms: float
    kv_bytes_raw: int
    kv_bytes_kept: int
    kv_bytes_sent: int
    transfer_ms: float
    transfer_exposed_ms: float
    transport: str
    visual_tokens_by_cut: _containers.RepeatedScalarFieldContainer[int]
    fetch_ms: float
    restored_tokens: int
    pulled_tokens: int
    def __init__(self, worker_id: _Optional[str] = ..., cached_tokens: _Optional[int] = ..., computed_tokens: _Optional[int] = ..., images: _Optional[int] = ..., images_cached: _Optional[int] = ..., encode_ms: _Optional[float] = ..., prefill_ms: _Optional[float] = ..., kv_bytes_raw: _Optional[int] = ..., kv_bytes_kept: _Optional[int] = ..., kv_bytes_sent: _Optional[int] = ..., transfer_ms: _Optional[float] = ..., transfer_exposed_ms: _Optional[float] = ..., transport: _Optional[str] = ..., visual_tokens_by_cut: _Optional[_Iterable[int]] = ..., fetch_ms: _Optional[float] = ..., restored_tokens: _Optional[int] = ..., pulled_tokens: _Optional[int] = ...) -> None: ...

class Stats(_message.Message):
    __slots__ = ("values", "state", "link_bytes_per_s")
    class ValuesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    class LinkBytesPerSEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    VALUES_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    LINK_BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    values: _containers.ScalarMap[str, float]
    state: str
    link_bytes_per_s: _containers.ScalarMap[str, float]
    def __init__(self, values: _Optional[_Mapping[str, float]] = ..., state: _Optional[str] = ..., link_bytes_per_s: _Optional[_Mapping[str, float]] = ...) -> None: ...

class ExplainRequest(_message.Message):
    __slots__ = ("request",)
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    request: Request
    def __init__(self, request: _Optional[_Union[Request, _Mapping]] = ...) -> None: ...

class ExplainedMedium(_message.Message):
    __slots__ = ("frames", "rows", "columns", "box_px")
    FRAMES_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    COLUMNS_FIELD_NUMBER: _ClassVar[int]
    BOX_PX_FIELD_NUMBER: _ClassVar[int]
    frames: int
    rows: int
    columns: int
    box_px: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, frames: _Optional[int] = ..., rows: _Optional[int] = ..., columns: _Optional[int] = ..., box_px: _Optional[_Iterable[float]] = ...) -> None: ...

class ExplainedStage(_message.Message):
    __slots__ = ("stage", "method", "layer", "fates")
    STAGE_FIELD_NUMBER: _ClassVar[int]
    METHOD_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    FATES_FIELD_NUMBER: _ClassVar[int]
    stage: str
    method: str
    layer: int
    fates: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, stage: _Optional[str] = ..., method: _Optional[str] = ..., layer: _Optional[int] = ..., fates: _Optional[_Iterable[int]] = ...) -> None: ...

class ExplainReply(_message.Message):
    __slots__ = ("refusal", "media", "stages")
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    MEDIA_FIELD_NUMBER: _ClassVar[int]
    STAGES_FIELD_NUMBER: _ClassVar[int]
    refusal: str
    media: _containers.RepeatedCompositeFieldContainer[ExplainedMedium]
    stages: _containers.RepeatedCompositeFieldContainer[ExplainedStage]
    def __init__(self, refusal: _Optional[str] = ..., media: _Optional[_Iterable[_Union[ExplainedMedium, _Mapping]]] = ..., stages: _Optional[_Iterable[_Union[ExplainedStage, _Mapping]]] = ...) -> None: ...

class Extent(_message.Message):
    __slots__ = ("first_page", "pages", "generation")
    FIRST_PAGE_FIELD_NUMBER: _ClassVar[int]
    PAGES_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    first_page: int
    pages: int
    generation: int
    def __init__(self, first_page: _Optional[int] = ..., pages: _Optional[int] = ..., generation: _Optional[int] = ...) -> None: ...

class ReserveRequest(_message.Message):
    __slots__ = ("request_id", "attempt", "source_worker", "source_epoch", "target_epoch", "layout_fingerprint", "wire_namespace", "codec", "prompt_tokens")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    SOURCE_WORKER_FIELD_NUMBER: _ClassVar[int]
    SOURCE_EPOCH_FIELD_NUMBER: _ClassVar[int]
    TARGET_EPOCH_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    WIRE_NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    attempt: int
    source_worker: str
    source_epoch: int
    target_epoch: int
    layout_fingerprint: bytes
    wire_namespace: bytes
    codec: MethodSpec
    prompt_tokens: int
    def __init__(self, request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., source_worker: _Optional[str] = ..., source_epoch: _Optional[int] = ..., target_epoch: _Optional[int] = ..., layout_fingerprint: _Optional[bytes] = ..., wire_namespace: _Optional[bytes] = ..., codec: _Optional[_Union[MethodSpec, _Mapping]] = ..., prompt_tokens: _Optional[int] = ...) -> None: ...

class ReserveReply(_message.Message):
    __slots__ = ("granted", "refusal", "retryable", "lease_id", "extent", "page_bytes", "cached_tokens", "ttl_s")
    GRANTED_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    RETRYABLE_FIELD_NUMBER: _ClassVar[int]
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    EXTENT_FIELD_NUMBER: _ClassVar[int]
    PAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TTL_S_FIELD_NUMBER: _ClassVar[int]
    granted: bool
    refusal: str
    retryable: bool
    lease_id: int
    extent: Extent
    page_bytes: int
    cached_tokens: int
    ttl_s: float
    def __init__(self, granted: _Optional[bool] = ..., refusal: _Optional[str] = ..., retryable: _Optional[bool] = ..., lease_id: _Optional[int] = ..., extent: _Optional[_Union[Extent, _Mapping]] = ..., page_bytes: _Optional[int] = ..., cached_tokens: _Optional[int] = ..., ttl_s: _Optional[float] = ...) -> None: ...

class Payload(_message.Message):
    __slots__ = ("layer", "start_token", "tokens", "offset_bytes", "encoded_bytes", "checksum", "codec")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    START_TOKEN_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    OFFSET_BYTES_FIELD_NUMBER: _ClassVar[int]
    ENCODED_BYTES_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    layer: int
    start_token: int
    tokens: int
    offset_bytes: int
    encoded_bytes: int
    checksum: bytes
    codec: int
    def __init__(self, layer: _Optional[int] = ..., start_token: _Optional[int] = ..., tokens: _Optional[int] = ..., offset_bytes: _Optional[int] = ..., encoded_bytes: _Optional[int] = ..., checksum: _Optional[bytes] = ..., codec: _Optional[int] = ...) -> None: ...

class Manifest(_message.Message):
    __slots__ = ("version", "request_id", "attempt", "source_worker", "source_epoch", "namespace", "layout_fingerprint", "codec", "layer_tokens", "next_position", "first_token_ids", "payloads", "raw_bytes", "first_logprobs")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    SOURCE_WORKER_FIELD_NUMBER: _ClassVar[int]
    SOURCE_EPOCH_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    LAYER_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NEXT_POSITION_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    PAYLOADS_FIELD_NUMBER: _ClassVar[int]
    RAW_BYTES_FIELD_NUMBER: _ClassVar[int]
    FIRST_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    version: int
    request_id: str
    attempt: int
    source_worker: str
    source_epoch: int
    namespace: bytes
    layout_fingerprint: bytes
    codec: MethodSpec
    layer_tokens: _containers.RepeatedScalarFieldContainer[int]
    next_position: int
    first_token_ids: _containers.RepeatedScalarFieldContainer[int]
    payloads: _containers.RepeatedCompositeFieldContainer[Payload]
    raw_bytes: int
    first_logprobs: _containers.RepeatedCompositeFieldContainer[TokenLogprobs]
    def __init__(self, version: _Optional[int] = ..., request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., source_worker: _Optional[str] = ..., source_epoch: _Optional[int] = ..., namespace: _Optional[bytes] = ..., layout_fingerprint: _Optional[bytes] = ..., codec: _Optional[_Union[MethodSpec, _Mapping]] = ..., layer_tokens: _Optional[_Iterable[int]] = ..., next_position: _Optional[int] = ..., first_token_ids: _Optional[_Iterable[int]] = ..., payloads: _Optional[_Iterable[_Union[Payload, _Mapping]]] = ..., raw_bytes: _Optional[int] = ..., first_logprobs: _Optional[_Iterable[_Union[TokenLogprobs, _Mapping]]] = ...) -> None: ...

class CommitRequest(_message.Message):
    __slots__ = ("lease_id", "generation", "manifest", "report")
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    REPORT_FIELD_NUMBER: _ClassVar[int]
    lease_id: int
    generation: int
    manifest: Manifest
    report: PrefillReport
    def __init__(self, lease_id: _Optional[int] = ..., generation: _Optional[int] = ..., manifest: _Optional[_Union[Manifest, _Mapping]] = ..., report: _Optional[_Union[PrefillReport, _Mapping]] = ...) -> None: ...

class CommitReply(_message.Message):
    __slots__ = ("accepted", "refusal", "retryable")
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    RETRYABLE_FIELD_NUMBER: _ClassVar[int]
    accepted: bool
    refusal: str
    retryable: bool
    def __init__(self, accepted: _Optional[bool] = ..., refusal: _Optional[str] = ..., retryable: _Optional[bool] = ...) -> None: ...

class PushRequest(_message.Message):
    __slots__ = ("target_worker", "target_epoch", "source_epoch", "lease_id", "extent", "layout_fingerprint", "codec", "namespace", "block_keys", "embedding_key", "request_id", "attempt", "cached_tokens", "page_bytes", "ttl_s")
    TARGET_WORKER_FIELD_NUMBER: _ClassVar[int]
    TARGET_EPOCH_FIELD_NUMBER: _ClassVar[int]
    SOURCE_EPOCH_FIELD_NUMBER: _ClassVar[int]
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    EXTENT_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    BLOCK_KEYS_FIELD_NUMBER: _ClassVar[int]
    EMBEDDING_KEY_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    TTL_S_FIELD_NUMBER: _ClassVar[int]
    target_worker: str
    target_epoch: int
    source_epoch: int
    lease_id: int
    extent: Extent
    layout_fingerprint: bytes
    codec: MethodSpec
    namespace: bytes
    block_keys: bytes
    embedding_key: bytes
    request_id: str
    attempt: int
    cached_tokens: int
    page_bytes: int
    ttl_s: float
    def __init__(self, target_worker: _Optional[str] = ..., target_epoch: _Optional[int] = ..., source_epoch: _Optional[int] = ..., lease_id: _Optional[int] = ..., extent: _Optional[_Union[Extent, _Mapping]] = ..., layout_fingerprint: _Optional[bytes] = ..., codec: _Optional[_Union[MethodSpec, _Mapping]] = ..., namespace: _Optional[bytes] = ..., block_keys: _Optional[bytes] = ..., embedding_key: _Optional[bytes] = ..., request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., cached_tokens: _Optional[int] = ..., page_bytes: _Optional[int] = ..., ttl_s: _Optional[float] = ...) -> None: ...

class PushReply(_message.Message):
    __slots__ = ("found", "refusal", "manifest", "visual_tokens", "positions", "raw_tokens")
    FOUND_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    VISUAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    RAW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    found: bool
    refusal: str
    manifest: Manifest
    visual_tokens: int
    positions: _containers.RepeatedScalarFieldContainer[int]
    raw_tokens: int
    def __init__(self, found: _Optional[bool] = ..., refusal: _Optional[str] = ..., manifest: _Optional[_Union[Manifest, _Mapping]] = ..., visual_tokens: _Optional[int] = ..., positions: _Optional[_Iterable[int]] = ..., raw_tokens: _Optional[int] = ...) -> None: ...
