-- Times are milliseconds since 1970, lists are JSON.

CREATE TABLE accounts (
    id BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    username TEXT NOT NULL,
    -- The name in lower case: two names that differ in nothing else are one.
    username_key TEXT NOT NULL UNIQUE,
    name TEXT,
    email TEXT,
    role BIGINT NOT NULL,
    -- A PHC string of Argon2id.
    password TEXT NOT NULL,
    created_at BIGINT NOT NULL,
    seen_at BIGINT
);

CREATE TABLE account_permissions (
    account_id BIGINT NOT NULL REFERENCES accounts (id) ON DELETE CASCADE,
    permission TEXT NOT NULL,
    PRIMARY KEY (account_id, permission)
);

-- A cookie is found by its selector and proven by the SHA-256 of the whole.
CREATE TABLE sessions (
    selector TEXT NOT NULL PRIMARY KEY,
    digest TEXT NOT NULL,
    account_id BIGINT NOT NULL REFERENCES accounts (id) ON DELETE CASCADE,
    created_at BIGINT NOT NULL,
    seen_at BIGINT NOT NULL
);
CREATE INDEX sessions_by_account ON sessions (account_id, created_at);

CREATE TABLE devices (
    selector TEXT NOT NULL PRIMARY KEY,
    digest TEXT NOT NULL,
    account_id BIGINT NOT NULL REFERENCES accounts (id) ON DELETE CASCADE,
    created_at BIGINT NOT NULL
);
CREATE INDEX devices_by_account ON devices (account_id, created_at);

CREATE TABLE tokens (
    id TEXT NOT NULL PRIMARY KEY,
    -- The SHA-256 of the secret.
    digest TEXT NOT NULL UNIQUE,
    name TEXT NOT NULL,
    kind TEXT NOT NULL,
    environment TEXT NOT NULL,
    projects TEXT NOT NULL,
    masked TEXT NOT NULL,
    expires_at BIGINT,
    created_at BIGINT NOT NULL,
    created_by TEXT NOT NULL,
    seen_at BIGINT
);

CREATE TABLE events (
    id BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    kind TEXT NOT NULL,
    created_by TEXT NOT NULL,
    created_by_user_id BIGINT,
    created_at BIGINT NOT NULL,
    ip TEXT,
    environment TEXT,
    project TEXT,
    data TEXT,
    pre_data TEXT
);
CREATE INDEX events_by_time ON events (created_at);

CREATE TABLE flag_usage (
    flag TEXT NOT NULL,
    environment TEXT NOT NULL,
    app_name TEXT NOT NULL,
    hour BIGINT NOT NULL,
    yes BIGINT NOT NULL,
    no BIGINT NOT NULL,
    PRIMARY KEY (flag, environment, app_name, hour)
);
CREATE INDEX flag_usage_by_hour ON flag_usage (hour);

CREATE TABLE variant_usage (
    flag TEXT NOT NULL,
    environment TEXT NOT NULL,
    app_name TEXT NOT NULL,
    hour BIGINT NOT NULL,
    variant TEXT NOT NULL,
    count BIGINT NOT NULL,
    PRIMARY KEY (flag, environment, app_name, hour, variant)
);
CREATE INDEX variant_usage_by_hour ON variant_usage (hour);

CREATE TABLE applications (
    app_name TEXT NOT NULL PRIMARY KEY,
    created_at BIGINT NOT NULL,
    seen_at BIGINT NOT NULL
);

-- What an application was seen with: an `environment`, an `sdk`, a `strategy`, an `instance`.
CREATE TABLE application_traits (
    app_name TEXT NOT NULL REFERENCES applications (app_name) ON DELETE CASCADE,
    kind TEXT NOT NULL,
    value TEXT NOT NULL,
    seen_at BIGINT NOT NULL,
    PRIMARY KEY (app_name, kind, value)
);
CREATE INDEX application_traits_by_time ON application_traits (seen_at);
