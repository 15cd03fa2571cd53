-- Control-plane state, as in SQLite's steps up to stages. `project` is the first part of every key; times are UTC milliseconds given by
-- the caller; documents are JSON text; digests are written `blake3:<64 hex>`. What is sorted is sorted by bytes, whatever the database's
-- own language is.

CREATE TABLE jobs (
    project     TEXT COLLATE "C" NOT NULL,
    job         TEXT COLLATE "C" NOT NULL,
    version     BIGINT NOT NULL, -- grows by one with each change: what a change is compared with
    name        TEXT COLLATE "C" NOT NULL,
    kind        TEXT NOT NULL,
    spec        TEXT NOT NULL, -- as submitted
    resolved    TEXT NOT NULL, -- references replaced by digests
    state       TEXT NOT NULL CHECK (state IN ('waiting', 'queued', 'starting', 'running', 'stopping', 'backoff',
                                               'paused', 'succeeded', 'failed', 'cancelled')),
    stop        TEXT CHECK (stop IN ('cancel', 'pause', 'preempt')),
    reason      TEXT NOT NULL, -- from the scheduling core's closed list
    message     TEXT NOT NULL,
    epoch       BIGINT NOT NULL CHECK (epoch >= 0),
    attempts    BIGINT NOT NULL CHECK (attempts >= 0),
    priority    BIGINT NOT NULL,
    core        TEXT NOT NULL, -- what the scheduling core needs to take the job up again
    metrics     BIGINT NOT NULL DEFAULT 0, -- number of the last metric point
    progress    TEXT,
    outputs     TEXT NOT NULL DEFAULT '[]',
    failure     TEXT,
    retry_of    TEXT,
    parent      TEXT COLLATE "C", -- the job that it is a stage of, if it is one
    stage       TEXT, -- its name there
    created_ms  BIGINT NOT NULL,
    updated_ms  BIGINT NOT NULL,
    started_ms  BIGINT,
    finished_ms BIGINT,
    PRIMARY KEY (project, job),
    CHECK ((state = 'stopping') = (stop IS NOT NULL)),
    CHECK ((state IN ('succeeded', 'failed', 'cancelled')) = (finished_ms IS NOT NULL))
);
CREATE INDEX jobs_unfinished ON jobs (project, job) WHERE finished_ms IS NULL;
CREATE INDEX jobs_by_state ON jobs (project, state, job);
CREATE INDEX jobs_by_parent ON jobs (project, parent, job) WHERE parent IS NOT NULL;

CREATE TABLE job_labels (
    project TEXT COLLATE "C" NOT NULL,
    job     TEXT COLLATE "C" NOT NULL,
    key     TEXT COLLATE "C" NOT NULL,
    value   TEXT NOT NULL,
    PRIMARY KEY (project, job, key),
    FOREIGN KEY (project, job) REFERENCES jobs (project, job)
);
CREATE INDEX job_labels_by_value ON job_labels (project, key, value, job);

-- Artifacts that a job was created with: they cannot be deleted until the job has ended.
CREATE TABLE job_inputs (
    project TEXT COLLATE "C" NOT NULL,
    job     TEXT COLLATE "C" NOT NULL,
    role    TEXT COLLATE "C" NOT NULL,
    digest  TEXT COLLATE "C" NOT NULL,
    PRIMARY KEY (project, job, role, digest),
    FOREIGN KEY (project, job) REFERENCES jobs (project, job)
);
CREATE INDEX job_inputs_by_digest ON job_inputs (project, digest);

CREATE TABLE attempts (
    project    TEXT COLLATE "C" NOT NULL,
    job        TEXT COLLATE "C" NOT NULL,
    epoch      BIGINT NOT NULL,
    cohort     BIGINT NOT NULL,
    workers    TEXT NOT NULL, -- JSON list of worker ids, by rank
    outcome    TEXT, -- absent while the attempt may be alive
    message    TEXT NOT NULL,
    reported   BIGINT NOT NULL, -- number of the last report that was recorded
    started_ms BIGINT NOT NULL,
    ended_ms   BIGINT,
    PRIMARY KEY (project, job, epoch),
    FOREIGN KEY (project, job) REFERENCES jobs (project, job)
);

CREATE TABLE cohorts (
    cohort     BIGINT NOT NULL PRIMARY KEY,
    project    TEXT COLLATE "C" NOT NULL,
    core       TEXT NOT NULL, -- members, leases and workers as the scheduling core wants them back
    created_ms BIGINT NOT NULL,
    ended_ms   BIGINT
);
CREATE INDEX cohorts_live ON cohorts (cohort) WHERE ended_ms IS NULL;

CREATE TABLE event_heads (
    project TEXT COLLATE "C" NOT NULL PRIMARY KEY,
    seq     BIGINT NOT NULL
);

CREATE TABLE events (
    project TEXT COLLATE "C" NOT NULL,
    seq     BIGINT NOT NULL,
    job     TEXT COLLATE "C",
    epoch   BIGINT,
    kind    TEXT NOT NULL,
    data    TEXT NOT NULL,
    time_ms BIGINT NOT NULL,
    PRIMARY KEY (project, seq)
);
CREATE INDEX events_by_job ON events (project, job, seq) WHERE job IS NOT NULL;

CREATE TABLE requests (
    project     TEXT COLLATE "C" NOT NULL,
    request     TEXT COLLATE "C" NOT NULL,
    body_digest TEXT NOT NULL,
    answer      TEXT NOT NULL,
    created_ms  BIGINT NOT NULL,
    PRIMARY KEY (project, request)
);

CREATE TABLE metrics (
    project TEXT COLLATE "C" NOT NULL,
    job     TEXT COLLATE "C" NOT NULL,
    seq     BIGINT NOT NULL, -- in the order of arrival, from 1, per job
    name    TEXT COLLATE "C" NOT NULL,
    step    BIGINT NOT NULL,
    epoch   BIGINT NOT NULL,
    value   DOUBLE PRECISION, -- NULL is not-a-number
    tokens  BIGINT NOT NULL,
    time_ms BIGINT NOT NULL,
    PRIMARY KEY (project, job, seq),
    UNIQUE (project, job, name, step, epoch),
    FOREIGN KEY (project, job) REFERENCES jobs (project, job)
);
CREATE INDEX metrics_by_step ON metrics (project, job, step);

CREATE TABLE artifacts (
    project    TEXT COLLATE "C" NOT NULL,
    digest     TEXT COLLATE "C" NOT NULL,
    kind       TEXT NOT NULL,
    size_bytes BIGINT NOT NULL CHECK (size_bytes >= 0),
    created_ms BIGINT NOT NULL,
    PRIMARY KEY (project, digest)
);
CREATE INDEX artifacts_by_time ON artifacts (project, created_ms, digest);

CREATE TABLE artifact_files (
    project    TEXT COLLATE "C" NOT NULL,
    digest     TEXT COLLATE "C" NOT NULL,
    path       TEXT COLLATE "C" NOT NULL,
    blob       TEXT COLLATE "C" NOT NULL,
    size_bytes BIGINT NOT NULL CHECK (size_bytes >= 0),
    PRIMARY KEY (project, digest, path),
    FOREIGN KEY (project, digest) REFERENCES artifacts (project, digest) ON DELETE CASCADE
);
CREATE INDEX artifact_files_by_blob ON artifact_files (project, blob);

-- Who made an artifact, when and how fast: facts of a run, kept out of the digest. Two jobs may make the same bytes.
CREATE TABLE artifact_commits (
    project    TEXT COLLATE "C" NOT NULL,
    digest     TEXT COLLATE "C" NOT NULL,
    job        TEXT COLLATE "C" NOT NULL,
    epoch      BIGINT NOT NULL,
    record     TEXT NOT NULL,
    created_ms BIGINT NOT NULL,
    PRIMARY KEY (project, digest, job, epoch),
    FOREIGN KEY (project, digest) REFERENCES artifacts (project, digest) ON DELETE CASCADE
);
CREATE INDEX artifact_commits_by_job ON artifact_commits (project, job, digest);

-- An edge outlives the artifact it points at: what was made from it still says so.
CREATE TABLE lineage (
    project TEXT COLLATE "C" NOT NULL,
    digest  TEXT COLLATE "C" NOT NULL,
    role    TEXT COLLATE "C" NOT NULL,
    cause   TEXT COLLATE "C" NOT NULL,
    PRIMARY KEY (project, digest, role, cause),
    FOREIGN KEY (project, digest) REFERENCES artifacts (project, digest) ON DELETE CASCADE
);
CREATE INDEX lineage_by_cause ON lineage (project, cause, digest);

CREATE TABLE tags (
    project  TEXT COLLATE "C" NOT NULL,
    tag      TEXT COLLATE "C" NOT NULL,
    digest   TEXT COLLATE "C" NOT NULL,
    job      TEXT COLLATE "C", -- the job that moved it, if a job did
    moved_ms BIGINT NOT NULL,
    PRIMARY KEY (project, tag),
    FOREIGN KEY (project, digest) REFERENCES artifacts (project, digest)
);
CREATE INDEX tags_by_digest ON tags (project, digest);

CREATE TABLE counters (
    name  TEXT COLLATE "C" NOT NULL PRIMARY KEY,
    value BIGINT NOT NULL
);

-- One row: which scheduler leads. It grows with each that opens the database, and whoever writes locks it first.
CREATE TABLE terms (
    one  BOOLEAN NOT NULL PRIMARY KEY DEFAULT TRUE CHECK (one),
    term BIGINT NOT NULL
);
INSERT INTO terms (term) VALUES (0);
