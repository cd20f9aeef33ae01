-- Contents of a version 1 database. The password is "correct horse battery".
INSERT INTO accounts (username, username_key, name, email, role, password, created_at, seen_at)
VALUES ('admin', 'admin', NULL, NULL, 1, 
    '$argon2id$v=19$m=19456,t=2,p=1$IJgVc/o+7LxfpkjwqZvIxQ$MQg0EEKPUe52Ts1b6unFpFhEydEV3CRpMoDD2Y4Am1s', 1767225600000, NULL);
INSERT INTO account_permissions (account_id, permission) VALUES (1, 'CREATE_CLIENT_API_TOKEN');
INSERT INTO tokens (id, digest, name, kind, environment, projects, masked, expires_at, created_at,
    created_by, seen_at)
VALUES ('AbCdEfGhIjKlMnOpQrStUv', 'b0006e7a8c7d8d32924669eff1bd21dd73354b8b133939b4b8f0b1f07f620abb', 'billing', 'backend', 'dev', '["web"]',
    'web:dev.AbCd****', NULL, 1767225600000, 'admin', 1767229200000);
INSERT INTO events (kind, created_by, created_by_user_id, created_at, ip, environment, project,
    data, pre_data)
VALUES ('api-token-created', 'admin', 1, 1767225600000, '192.0.2.1', 'dev', 'web',
    '{"tokenName":"billing"}', NULL);
INSERT INTO flag_usage (flag, environment, app_name, hour, yes, no)
VALUES ('blue', 'dev', 'shop', 1767225600000, 7, 2);
INSERT INTO variant_usage (flag, environment, app_name, hour, variant, count)
VALUES ('blue', 'dev', 'shop', 1767225600000, 'a', 3);
INSERT INTO applications (app_name, created_at, seen_at)
VALUES ('shop', 1767225600000, 1767225600000);
INSERT INTO application_traits (app_name, kind, value, seen_at)
VALUES ('shop', 'sdk', 'node:6.0.0', 1767225600000);
