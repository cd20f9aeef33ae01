//! The settings of `health` and `ready`: the URL to probe, and how its certificate is verified.

use std::{mem::take, net::SocketAddr};

use super::{
    cli::{Probe, Subcommand},
    error::ConfigErrors,
    model::{ProbeOptions, ProbeTrust},
    options,
    raw::RawSettings,
    tls,
    values::{
        EXPECTED_FILE, EXPECTED_HTTP_URL, base_path, existing_file, interface, parse_http_url, port,
    },
};

/// Validates the settings of `health` and `ready`.
pub(super) fn probe(s: &mut RawSettings, probe: Probe) -> Result<ProbeOptions, ConfigErrors> {
    let ca_file = s.parse_optional(&options::CA_CERTIFICATE_FILE, EXPECTED_FILE, existing_file);
    let sdk_path =
        format!("{}/internal-backstage/{}", base_path(s), Subcommand::Probe(probe).name());
    let (url, path, trust) = if s.is_set(&options::EDGE_URL) {
        let url = s.parse_optional(&options::EDGE_URL, EXPECTED_HTTP_URL, parse_http_url);
        (url, sdk_path, ProbeTrust::Platform(ca_file))
    } else {
        let trust = ca_file.map_or(ProbeTrust::Any, ProbeTrust::Authority);
        let (address, is_tls, path) = local_address(s, probe, sdk_path);
        let scheme = if is_tls { "https" } else { "http" };
        let host = if address.ip().is_unspecified() {
            format!("localhost:{}", address.port())
        } else {
            address.to_string()
        };
        (parse_http_url(&format!("{scheme}://{host}")), path, trust)
    };
    ConfigErrors::check_empty(take(&mut s.errors))?;
    let mut url = url.expect("an invalid URL is an error");
    let before = url.path().trim_end_matches('/').to_owned();
    url.set_path(&format!("{before}{path}"));
    Ok(ProbeOptions { url, trust })
}

/// The address, whether it uses TLS, and the path at which the instance on this machine answers
/// `probe` without a client certificate: on the data listener, or else on the admin listener.
fn local_address(
    s: &mut RawSettings,
    probe: Probe,
    sdk_path: String,
) -> (SocketAddr, bool, String) {
    let of_clients = tls::requires_client_certificates(s, &tls::DATA);
    let of_operators = tls::requires_client_certificates(s, &tls::ADMIN);
    let is_tls = s.switch(&options::TLS_ENABLE);
    if !is_tls || !of_clients {
        let port_key = if is_tls { &options::TLS_SERVER_PORT } else { &options::PORT };
        let address = SocketAddr::new(interface(s, &options::INTERFACE), port(s, port_key));
        return (address, is_tls, sdk_path);
    }
    let address =
        SocketAddr::new(interface(s, &options::ADMIN_INTERFACE), port(s, &options::ADMIN_PORT));
    let is_tls = s.is_set(&options::ADMIN_TLS_CERT);
    if is_tls && of_operators {
        let reason =
            "is required: both listeners require client certificates, and probes have none";
        s.report_error(&options::EDGE_URL, reason);
    }
    let path = match probe {
        Probe::Health => "/live",
        Probe::Ready => "/ready",
    };
    (address, is_tls, path.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{
        Command,
        tests::{errors, parse},
    };

    #[test]
    fn probe_uses_address_of_instance() {
        for (line, expect) in [
            ("health", "http://localhost:3063/internal-backstage/health"),
            ("health -i 0.0.0.0 -p 7", "http://localhost:7/internal-backstage/health"),
            ("ready -i 127.0.0.2", "http://127.0.0.2:3063/internal-backstage/ready"),
            ("ready -i ::1 --base-path /x", "http://[::1]:3063/x/internal-backstage/ready"),
        ] {
            let Ok(Command::Probe(probe)) = parse(line, &[]) else { panic!("{line}") };
            assert_eq!(probe.url.as_str(), expect);
        }
    }

    #[test]
    fn probe_uses_local_instance_by_default() {
        let check = |line: &str, env: &[(&str, &str)], url: &str| match parse(line, env) {
            Ok(Command::Probe(probe)) => assert_eq!(probe.url.as_str(), url),
            other => panic!("{line}: {other:?}"),
        };
        check("health", &[], "http://localhost:3063/internal-backstage/health");
        check("ready", &[("PORT", "80")], "http://localhost/internal-backstage/ready");
        let env = [("BASE_PATH", "/base"), ("TLS_ENABLE", "true")];
        check("ready -e http://edge:1/", &env, "http://edge:1/base/internal-backstage/ready");
        check("ready", &env, "https://localhost:3043/base/internal-backstage/ready");
        check(
            "ready --tls-server-port 443",
            &env,
            "https://localhost/base/internal-backstage/ready",
        );
        // Probes have no client certificate.
        let env = [("TLS_ENABLE", "true"), ("TLS_CLIENT_CA_FILE", "ca.crt")];
        check("ready", &env, "http://127.0.0.1:3064/ready");
        check("health --admin-tls-cert tls.crt", &env, "https://127.0.0.1:3064/live");
        check(
            "health --tls-client-auth optional",
            &env,
            "https://localhost:3043/internal-backstage/health",
        );
        let both = "ready --admin-tls-cert tls.crt --admin-tls-client-ca-file ca.crt";
        assert!(errors(both, &env)[0].contains("both listeners require client certificates"));
    }

    #[test]
    fn probe_verifies_certificates_of_remote_instances() {
        let check = |line: &str, expected: ProbeTrust| match parse(line, &[("TLS_ENABLE", "true")])
        {
            Ok(Command::Probe(probe)) => assert_eq!(probe.trust, expected, "{line}"),
            other => panic!("{line}: {other:?}"),
        };
        let file = "config/flags.json";
        check("ready", ProbeTrust::Any);
        check(&format!("ready -c {file}"), ProbeTrust::Authority(file.into()));
        check("ready -e https://edge", ProbeTrust::Platform(None));
        check(&format!("ready -e https://edge -c {file}"), ProbeTrust::Platform(Some(file.into())));
    }
}
