-- Settings that the first start has heeded, as digests: a later start tells from them what was changed
-- without effect. Of a password it is a PHC string of Argon2id.
CREATE TABLE initial_settings (
    name TEXT NOT NULL PRIMARY KEY,
    digest TEXT NOT NULL
);
