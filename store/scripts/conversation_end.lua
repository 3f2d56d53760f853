-- Delete a conversation that nobody used for as long as it is kept, if it is still as it was archived.
-- App and user state stay.
--
-- KEYS  1 … 9 see session_functions.lua   10 keeper
-- ARGV  1 "holder epoch"   2 member   3 incarnation   4 last entry   5 retention in ms   6 note for the log
-- Answer  "ended", "used" (somebody came back), "changed" (it is another by now), "gone" (it was gone)
-- Errors  FENCED   another worker looks after the app; nothing is deleted
-- with: conversation_functions
if redis.call('GET', KEYS[10]) ~= ARGV[1] then return redis.error_reply('FENCED') end
local now = now_ms()
local head = redis.call('HMGET', KEYS[1], 'incarnation', 'last')
local used = redis.call('ZSCORE', KEYS[8], ARGV[2])
local answer = 'ended'
if not head[1] then
  answer = 'gone'
elseif used and tonumber(used) > now - tonumber(ARGV[5]) then
  return 'used'
elseif head[1] ~= ARGV[3] or head[2] ~= ARGV[4] then
  return 'changed'
end
local expires = redis.call('ZSCORE', KEYS[6], ARGV[2])
redis.call('UNLINK', KEYS[1], KEYS[2], KEYS[3])
for i = 6, 8 do redis.call('ZREM', KEYS[i], ARGV[2]) end
local note = ARGV[6]
if answer == 'gone' then
  -- It expired a moment ago, or somebody deleted its keys by hand.
  local reason = expires and expires ~= 'inf' and 'ttl' or 'gone'
  note = cjson.encode({member = ARGV[2], reason = reason})
end
note_end(KEYS[9], now, note)
return answer
