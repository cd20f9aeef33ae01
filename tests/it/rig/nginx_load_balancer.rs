//! A real nginx in front of instances of Parapet. It keeps connections to them alive, and uses the next
//! one if an instance refuses connections.

use std::fmt::Write as _;
use std::process::Command;

use tempfile::TempDir;

use super::guarded_process::{GuardedProcess, OnParentExit};
use super::net::free_port;
use super::self_signed_certificate::SelfSignedCertificate;

/// The path in Debian's package.
const NGINX_PATH: &str = "/usr/sbin/nginx";

/// A running nginx; killed when dropped.
#[derive(Debug)]
pub(crate) struct Nginx {
    process: GuardedProcess,
    /// Its configuration and temporary files.
    _folder: TempDir,
    http1: u16,
    http2: u16,
    tls: u16,
}

impl Nginx {
    /// Starts nginx in front of these addresses, with TLS to them or without. Its own clients can use
    /// either, with this certificate.
    pub(crate) async fn start(
        upstreams: &[String],
        is_tls: bool,
        certificate: &SelfSignedCertificate,
    ) -> Self {
        let folder = tempfile::Builder::new().prefix("nginx-").tempdir().unwrap();
        let [http1, http2, tls] = [(); 3].map(|()| free_port());
        let mut servers = String::new();
        for upstream in upstreams {
            // It retries each at once: a restarted instance is back within seconds.
            writeln!(servers, "server {upstream} max_fails=0;").unwrap();
        }
        let (scheme, file) = (if is_tls { "https" } else { "http" }, certificate.file());
        let (file, key) = (file.display(), certificate.key_file());
        let (key, directory) = (key.display(), folder.path().display());
        let config = format!(
            "daemon off; master_process off; pid {directory}/pid; error_log stderr warn;
            events {{ worker_connections 1024; }}
            http {{
                access_log off;
                client_body_temp_path {directory}; proxy_temp_path {directory};
                fastcgi_temp_path {directory}; uwsgi_temp_path {directory}; scgi_temp_path {directory};
                keepalive_requests 1000000;
                upstream parapet {{ {servers} keepalive 32; keepalive_requests 1000000; }}
                server {{
                    listen 127.0.0.1:{http1};
                    listen 127.0.0.1:{http2} http2;
                    listen 127.0.0.1:{tls} ssl http2;
                    ssl_certificate {file}; ssl_certificate_key {key};
                    location / {{
                        proxy_pass {scheme}://parapet;
                        proxy_http_version 1.1;
                        proxy_set_header Connection \"\";
                        proxy_buffering off;
                        proxy_ssl_trusted_certificate {file}; proxy_ssl_verify on; proxy_ssl_name localhost;
                    }}
                }}
            }}"
        );
        let file = folder.path().join("nginx.conf");
        std::fs::write(&file, config).unwrap();
        let mut command = Command::new(NGINX_PATH);
        command.arg("-c").arg(&file).arg("-p").arg(folder.path()).args(["-e", "stderr"]);
        let mut process = GuardedProcess::spawn("nginx", &command, OnParentExit::Kill);
        process
            .wait_until(async || tokio::net::TcpStream::connect(("127.0.0.1", tls)).await.is_ok())
            .await;
        Self { process, _folder: folder, http1, http2, tls }
    }

    /// The address (`127.0.0.1:<port>`) for HTTP/1.1.
    pub(crate) fn http1(&self) -> String {
        format!("127.0.0.1:{}", self.http1)
    }

    /// The address for HTTP/2 without TLS.
    pub(crate) fn http2(&self) -> String {
        format!("127.0.0.1:{}", self.http2)
    }

    /// The address for both over TLS.
    pub(crate) fn tls(&self) -> String {
        format!("127.0.0.1:{}", self.tls)
    }

    /// The errors that it has logged, without those of refused connections.
    pub(crate) fn log(&self) -> String {
        let text = self.process.output().text();
        let telling = text.lines().filter(|line| !line.contains("Connection refused"));
        telling.collect::<Vec<_>>().join("\n")
    }
}
