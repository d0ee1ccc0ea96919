// A fixed-point number times a power of two as IEEE float32, rounded once, to nearest even.
//
// value * 2**(exponent - 48). Beyond the range it is an infinity; results below the smallest normal number become 0 (as
// on the vector units of most devices; the contract allows 1e-30 there). `special` gives a NaN.
// Latency: 6 cycles, a new number every cycle.
module to_float32 #(
    parameter WIDTH = 112              // at most 128
) (
    input  wire                    clk,
    input  wire signed [WIDTH-1:0] value,
    input  wire signed [8:0]       exponent,
    input  wire                    special,
    output reg  [31:0]             result
);
    // Sign and size.
    reg [WIDTH-1:0] size;
    reg sign1;
    always @(posedge clk) begin
        sign1 <= value[WIDTH-1];
        size  <= value[WIDTH-1] ? -value : value;
    end

    // The leading one to bit 127, in steps of 64 and 32, 16 and 8, 4 and 2 and 1. `zeros` counts.
    wire [127:0] in0 = {size, {(128 - WIDTH){1'b0}}};
    wire [127:0] in1 = |in0[127:64] ? in0 : in0 << 64;
    reg [127:0] q2, q3, q4;
    reg [6:0] zeros2, zeros3, zeros4;
    reg sign2, sign3, sign4;
    wire [127:0] in2 = |q2[127:112] ? q2 : q2 << 16;
    wire [127:0] in3 = |q3[127:124] ? q3 : q3 << 4;
    wire [127:0] in4 = |in3[127:126] ? in3 : in3 << 2;
    always @(posedge clk) begin
        q2     <= |in1[127:96] ? in1 : in1 << 32;
        zeros2 <= {~|in0[127:64], ~|in1[127:96], 5'd0};
        sign2  <= sign1;
        q3     <= |in2[127:120] ? in2 : in2 << 8;
        zeros3 <= zeros2 | {2'd0, ~|q2[127:112], ~|in2[127:120], 3'd0};
        sign3  <= sign2;
        q4     <= in4[127] ? in4 : in4 << 1;
        zeros4 <= zeros3 | {4'd0, ~|q3[127:124], ~|in3[127:126], ~in4[127]};
        sign4  <= sign3;
    end

    // Bit 127 stands for 2**(127 - (128 - WIDTH) - 48); the exponent field of float32 is 127 more than the power of two.
    localparam signed [10:0] BIAS = 127 + WIDTH - 1 - 48;
    wire signed [8:0] exponent4;
    wire special4;
    delay #(.WIDTH(10), .CYCLES(4)) along (.clk(clk), .d({special, exponent}), .q({special4, exponent4}));
    reg [24:0] rounded;                // 24 bits and a carry
    reg signed [10:0] field5;
    reg sign5, zero5, special5;
    wire up = q4[103] & (q4[104] | |q4[102:0]);
    // A carry out of the 24 bits leaves 1000..0, whose fraction is 0 as it stands; only the exponent grows.
    wire signed [10:0] field6 = field5 + $signed({10'd0, rounded[24]});
    always @(posedge clk) begin
        rounded  <= {1'b0, q4[127:104]} + {24'd0, up};
        field5   <= BIAS + $signed({{2{exponent4[8]}}, exponent4}) - $signed({4'd0, zeros4});
        zero5    <= ~q4[127];
        sign5    <= sign4;
        special5 <= special4;
        if (special5)              result <= 32'h7FC00000;
        else if (zero5)            result <= 32'd0;
        else if (field6 >= 255)    result <= {sign5, 8'hFF, 23'd0};
        else if (field6 <= 0)      result <= {sign5, 31'd0};
        else                       result <= {sign5, field6[7:0], rounded[22:0]};
    end
endmodule
