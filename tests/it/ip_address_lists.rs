//! Lists of IP addresses match as in Unleash Edge, whose engine is yggdrasil.
//!
//! Unleash and the Node SDK match only IPv4 in the strategy `remoteAddress`, and no netmasks. Equal
//! texts match there and in Parapet, even if they are not addresses.

use std::net::IpAddr;

use jiff::Timestamp;
use parapet::engine::{Context, Engine};
use parapet::protocol::features::Document;
use proptest::prelude::*;
use proptest::sample::{select, subsequence};
use serde_json::{Value, json};
use unleash_yggdrasil::{EngineState, UpdateMessage};

/// A flag with a list in the strategy `remoteAddress`, and one with the same list in the operator
/// `IN_CIDR`.
fn document_with_ip_list(list: &[&str]) -> Value {
    let constraint =
        json!({ "contextName": "remoteAddress", "operator": "IN_CIDR", "values": list });
    let flag = |name: &str, strategy: Value| json!({ "name": name, "enabled": true, "project": "web", "strategies": [strategy] });
    json!({ "version": 2, "features": [
        flag("strategy", json!({ "name": "remoteAddress", "parameters": { "IPs": list.join(",") } })),
        flag("operator", json!({ "name": "default", "constraints": [constraint] })),
    ]})
}

const FLAGS: [&str; 2] = ["strategy", "operator"];

fn evaluate(document: &Value, address: &str) -> [bool; 2] {
    let (engine, _) = Engine::compile(&Document::parse(document.to_string().as_bytes()).unwrap());
    let now = Timestamp::now();
    let context = Context { remote_address: Some(address), now, ..Context::default() };
    let bound = engine.bind(&context);
    FLAGS.map(|name| {
        let id = engine.ids().find(|id| &**engine.flag(*id).name() == name).unwrap();
        engine.evaluate(id, &bound).is_on()
    })
}

fn evaluate_with_yggdrasil(document: &Value, address: &str) -> [bool; 2] {
    let peer = EngineState::default();
    let flags = serde_json::from_value(document.clone()).unwrap();
    peer.take_state(UpdateMessage::FullResponse(flags));
    let context = unleash_yggdrasil::Context {
        remote_address: Some(address.to_owned()),
        ..unleash_yggdrasil::Context::default()
    };
    let responses = peer.resolve_all(&context, &None).unwrap();
    FLAGS.map(|name| responses[name].enabled)
}

#[test]
fn address_lists_match_as_in_unleash_edge() {
    let check = |list: &str, address: &str, expect: bool| {
        let document = document_with_ip_list(&list.split(',').collect::<Vec<_>>());
        let theirs = evaluate_with_yggdrasil(&document, address);
        assert_eq!(theirs, [expect; 2], "yggdrasil: {address} in {list}");
        assert_eq!(evaluate(&document, address), theirs, "{address} in {list}");
    };
    check("2001:db8::/32", "2001:db8::1", true);
    check("2001:db8::/32", "2001:DB8:0:0:0:0:0:1", true);
    check("2001:db8::/32", "2001:db9::1", false);
    check("2001:0DB8:0000:0000:0000:0000:0000:0000/32", "2001:db8:ffff::", true);
    check("2001:db8::1", "2001:0db8:0000:0000:0000:0000:0000:0001", true);
    check("2001:DB8::A", "2001:db8::a", true);
    check("2001:db8:0:0::a", "2001:db8::a", true);
    check("2001:db8::ff/32", "2001:db8::1", true);
    check("::1/128", "::1", true);
    check("::1/128", "0:0:0:0:0:0:0:1", true);
    check("::1", "::2", false);
    check("::/0", "2001:db8::1", true);
    check("::/0", "10.0.0.1", false);
    check("0.0.0.0/0", "2001:db8::1", false);
    check("10.0.0.0/8,2001:db8::/32", "10.1.2.3", true);
    check("10.0.0.0/8,2001:db8::/32", "2001:db8::7", true);
    check("10.0.0.0/8, 2001:db8::/32 ,::1", "::1", true);
    check("bad,2001:db8::/32,10.0.0.0/33", "2001:db8::7", true);
    check("bad,2001:db8::/129,10.0.0.0/33", "10.0.0.1", false);
    check("10.0.0.0/255.0.0.0", "10.9.8.7", true);
    check("10.0.0.0/255.0.0.0", "11.9.8.7", false);
    check("10.0.0.0/255.0.255.0", "10.9.0.7", false);
    // An IPv4-mapped IPv6 address is an IPv6 address. The address of a connection never has this form.
    check("::ffff:10.0.0.1", "::ffff:a00:1", true);
    check("::ffff:10.0.0.0/104", "::ffff:10.9.8.7", true);
    check("10.0.0.0/8", "::ffff:10.0.0.1", false);
    check("::ffff:10.0.0.0/104", "10.0.0.1", false);
    check("fe80::1%eth0", "fe80::1", false);
    check("[::1]", "::1", false);
    check("10.0.0.1", " 10.0.0.1", false);
}

#[test]
fn space_around_an_address_list_is_ignored() {
    let document = document_with_ip_list(&[" 10.0.0.0/8", " ::1 "]);
    for address in ["10.0.0.1", "::1"] {
        assert!(evaluate_with_yggdrasil(&document, address)[0], "yggdrasil: {address}");
        // The operator's values are trimmed as in the Node SDK.
        assert_eq!(evaluate(&document, address), [true; 2], "{address}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(256) })]

    #[test]
    fn all_address_spellings_match_as_in_unleash_edge(
        list in subsequence(SPELLINGS.to_vec(), 1..6).prop_shuffle(),
        suffixes in proptest::collection::vec(select(SUFFIXES.to_vec()), 6),
        address in select(SPELLINGS.to_vec()),
    ) {
        let list: Vec<String> = list.iter().zip(suffixes).map(|(it, suffix)| format!("{it}{suffix}")).collect();
        prop_assume!(address.parse::<IpAddr>().is_ok());
        let document = document_with_ip_list(&list.iter().map(String::as_str).collect::<Vec<_>>());
        prop_assert_eq!(evaluate(&document, address), evaluate_with_yggdrasil(&document, address));
    }
}

const SPELLINGS: [&str; 22] = [
    "10.0.0.1",
    "10.1.2.3",
    "192.168.1.1",
    "0.0.0.0",
    "255.255.255.255",
    "010.0.0.1",
    "10.0.1",
    "::1",
    "::",
    "0:0:0:0:0:0:0:1",
    "0000:0000:0000:0000:0000:0000:0000:0001",
    "2001:db8::1",
    "2001:DB8::1",
    "2001:0db8:0000:0000:0000:0000:0000:0001",
    "2001:db8:0:1::",
    "2001:db8::1:0:0:1",
    "::ffff:10.0.0.1",
    "::ffff:a00:1",
    "64:ff9b::10.0.0.1",
    "fe80::1%eth0",
    "2001:db8:::1",
    "nowhere",
];
const SUFFIXES: [&str; 14] = [
    "",
    "",
    "",
    "/0",
    "/8",
    "/24",
    "/32",
    "/33",
    "/96",
    "/128",
    "/129",
    "/08",
    "/255.255.0.0",
    "/",
];
