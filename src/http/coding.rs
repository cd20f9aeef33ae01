//! Which content coding a client prefers (RFC 9110, 12.5.3).

use hyper::header::{ACCEPT_ENCODING, HeaderMap};

use crate::snapshot::body::Coding;

/// The coding to answer with: the client's highest weight, and between equals the one that is
/// smallest on the wire for JSON.
///
/// The RFC lets a server answer in identity when nothing else is acceptable, so that this never
/// refuses.
pub fn preferred(headers: &HeaderMap) -> Coding {
    let mut best = (0, Coding::Identity);
    for value in headers.get_all(ACCEPT_ENCODING) {
        let Ok(value) = value.to_str() else { continue };
        for item in value.split(',') {
            let (name, weight) = weighed(item);
            let coding = match name {
                _ if name.eq_ignore_ascii_case("br") || name == "*" => Coding::Brotli,
                _ if name.eq_ignore_ascii_case("zstd") => Coding::Zstd,
                _ if name.eq_ignore_ascii_case("gzip") || name.eq_ignore_ascii_case("x-gzip") => {
                    Coding::Gzip
                }
                _ if name.eq_ignore_ascii_case("identity") => Coding::Identity,
                _ => continue,
            };
            if (weight, coding.rank()) > (best.0, best.1.rank()) && weight > 0 {
                best = (weight, coding);
            }
        }
    }
    best.1
}

/// A coding's name and its weight in thousandths.
fn weighed(item: &str) -> (&str, u16) {
    let (name, parameters) = item.split_once(';').unwrap_or((item, ""));
    let weight = parameters.trim().strip_prefix("q=").or(parameters.trim().strip_prefix("Q="));
    let weight = match weight.map(|text| text.trim().parse::<f32>()) {
        None => 1000,
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "clamped to 0 to 1000 just before"
        )]
        Some(Ok(weight)) => (weight.clamp(0.0, 1.0) * 1000.0) as u16,
        Some(Err(_)) => 0,
    };
    (name.trim(), weight)
}

#[cfg(test)]
mod tests {
    use hyper::header::HeaderValue;

    use super::*;

    #[track_caller]
    fn check(value: &'static str, expect: Coding) {
        let mut headers = HeaderMap::new();
        headers.insert(ACCEPT_ENCODING, HeaderValue::from_static(value));
        assert_eq!(preferred(&headers), expect, "{value}");
    }

    #[test]
    fn the_highest_weight_wins_and_then_the_smallest_body() {
        check("gzip", Coding::Gzip);
        check("gzip, deflate, br", Coding::Brotli);
        check("gzip;q=1.0, br;q=0.5", Coding::Gzip);
        check("gzip, zstd", Coding::Zstd);
        check("*", Coding::Brotli);
        check("br;q=0, gzip;q=0.1", Coding::Gzip);
        check("identity, gzip;q=0.5", Coding::Identity);
    }

    #[test]
    fn without_a_usable_wish_the_body_goes_as_it_is() {
        assert_eq!(preferred(&HeaderMap::new()), Coding::Identity);
        check("deflate", Coding::Identity);
        check("gzip;q=nonsense", Coding::Identity);
        check("", Coding::Identity);
    }
}
